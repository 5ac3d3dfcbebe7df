"""The README's file tree: one line a file, the first line of each file's docstring; --check fails where it is not true.

python tools/tree.py            writes it between the markers in README.md
python tools/tree.py --check    changes nothing, exits with 1 where the README says something else
"""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
BEGIN, END = "<!-- file tree: python tools/tree.py -->\n", "<!-- end of file tree -->\n"
WITHOUT_DOCSTRING = {
    ".ci/run": "what CI calls: make check",
    "CHANGELOG.md": "what a user sees change",
    "CONTRIBUTING.md": "how code comes in",
    "LICENSE": "Apache-2.0",
    "Makefile": "setup, demo, test, check, bench",
    "constraints.txt": "one exact, tested set of versions for Python 3.11",
    "docs/demo-curves.png": "curves of make demo",
    "docs/diarisation-curves.png": "curves of docs/results.md, diarisation",
    "docs/real-curves.png": "curves of docs/results.md, real speech",
    "docs/sentences-curves.png": "curves of docs/results.md, read sentences",
    "docs/speaker-curves.png": "curves of docs/results.md, speakers",
    "docs/LOG.md": "dated experiments, the failed ones too",
    "pyproject.toml": "package, extras, ruff, mypy, pytest, import contracts",
    "requirements-test.txt": "what tests, checks and the demo need on top",
    "requirements.txt": "what the library needs to run",
    "wavlm_jax/py.typed": "the package is typed",
}
"""One line for files that cannot hold it themselves; documents say it in their title."""
FOLDERS = {"docs/plans": "figures of docs/pods.md's table, one file a cell: python -m bench.plan_table"}
"""Folders of one kind of file, told in one line."""
HIDDEN = {".gitignore", "README.md"}
COLUMN = 44


def files() -> list[str]:
    """What git tracks, and what is about to be."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    output = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout  # noqa: S603
    return sorted({name for name in output.splitlines() if name not in HIDDEN and (ROOT / name).is_file()})


def line_of(name: str) -> str:
    """What the file says of itself in its first line; empty for packages and data."""
    if name in WITHOUT_DOCSTRING:
        return WITHOUT_DOCSTRING[name]
    path = ROOT / name
    if path.suffix == ".py":
        docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
        return docstring.partition("\n")[0].rstrip(".")
    if path.suffix == ".md":
        return path.read_text().partition("\n")[0].lstrip("# ")
    if path.suffix == ".sh":
        comments = (line for line in path.read_text().split("\n")[1:] if not line.startswith("#SBATCH"))
        return next(comments).lstrip("# ")
    return ""


def tree() -> str:
    """The block between the markers."""
    lines, folder = [], ""
    for name in sorted(files(), key=lambda name: ("/" in name, *name.rpartition("/"))):
        parent, _, base = name.rpartition("/")
        if parent in FOLDERS:
            if parent != folder:
                lines.append(f"{parent + '/':{COLUMN}}{FOLDERS[parent]}")
                folder = parent
            continue
        if parent != folder:
            lines.append(f"{parent}/")
            folder = parent
        shown = ("  " if parent else "") + base
        text = line_of(name)
        lines.append(f"{shown:{COLUMN}}{text}".rstrip())
    return "```\n" + "\n".join(lines) + "\n```\n"


def main() -> int:
    """Write the tree, or compare it."""
    text = README.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        print(f"README.md: the markers {BEGIN.strip()} and {END.strip()} are not there", file=sys.stderr)
        return 1
    wanted = before + BEGIN + tree() + END + after
    if "--check" in sys.argv:
        if text != wanted:
            print("README.md: the file tree is not true any more; run: python tools/tree.py", file=sys.stderr)
        return int(text != wanted)
    README.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
