"""Converts weights, with a proof: python -m wavlm_jax.convert import SOURCE OUT, or export SOURCE OUT --to FORMAT.

The kind of SOURCE is found out from its content: a Hugging Face folder or the name of a model on its hub, the authors'
.pt, a fairseq or UniSpeech checkpoint, a torchaudio state dict, or the workdir of a run of ours. `import` writes a
folder that `wavlm_jax.load` and transformers read; `export --to huggingface` the same, `--to microsoft` a .pt.
"""

import argparse
import sys

import jax

from wavlm_jax.convert.bare import LIKE
from wavlm_jax.export import conventions, save_huggingface, save_microsoft
from wavlm_jax.files import named
from wavlm_jax.loading import load

EXIT_WRONG = 2


def main() -> int:
    """The exit code: 0, or 2 and a message where the conversion cannot be done or proved."""
    parser = _parser()
    arguments = parser.parse_args()
    if arguments.with_head and arguments.to != "microsoft":
        parser.error("--with-head: is for --to microsoft; a folder always has the head, in a file of its own")
    jax.config.update("jax_platforms", "cpu")  # leaves the accelerators to runs
    try:
        model = load(arguments.source, step=arguments.step, num_attention_heads=arguments.heads, like=arguments.like)
        print(f"{arguments.source}: {model.weights.origin.dialect}")
        for line in (*model.weights.origin.notes, *conventions(model.weights)):
            print(f"  {line}")
        compared = not arguments.no_compare
        if arguments.to == "microsoft":
            proof = save_microsoft(
                model, arguments.out, dtype=arguments.dtype, compared=compared, with_head=arguments.with_head
            )
        else:
            proof = save_huggingface(model, arguments.out, dtype=arguments.dtype, compared=compared)
    except (ValueError, OSError) as error:
        print(f"wavlm_jax.convert: {error}", file=sys.stderr)
        return EXIT_WRONG
    files = sorted(path.name for path in arguments.out.iterdir()) if arguments.out.is_dir() else ["written"]
    print(f"{arguments.out}: {', '.join(files)}")
    for line in proof.lines():
        print(f"  {line}")
    if arguments.to == "microsoft" and model.weights.head is not None and not arguments.with_head:
        print("  left out: the pre-training head, which the authors' class refuses; --with-head writes it too")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m wavlm_jax.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    bring = commands.add_parser("import", help="anything -> a folder that wavlm_jax.load and transformers read")
    bring.set_defaults(to="huggingface", with_head=False)
    export = commands.add_parser("export", help="write weights in another project's format")
    export.add_argument("--to", choices=("huggingface", "microsoft"), required=True, help="whose format")
    export.add_argument(
        "--with-head",
        action="store_true",
        help="microsoft: the pre-training head too, which the authors' class refuses",
    )
    for command in (bring, export):
        command.add_argument("source", help="folder, file, workdir of a run, or name on the hub")
        command.add_argument("out", type=named, help="folder (or, for microsoft, file) to write")
        command.add_argument("--step", type=int, help="checkpoint of the run; the newest if not given")
        command.add_argument(
            "--heads", type=int, help="attention heads of a torchaudio HuBERT; those of the published size if not given"
        )
        command.add_argument(
            "--like", choices=sorted(LIKE), help="sizes of a state dict that has no config in it or beside it"
        )
        command.add_argument(
            "--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="of the numbers written"
        )
        command.add_argument(
            "--no-compare", action="store_true", help="do not compare with transformers, only read the file again"
        )
    return parser


if __name__ == "__main__":
    sys.exit(main())
