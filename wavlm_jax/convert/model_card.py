"""The README.md of an export: what the model is, what it learned from, and how exact the conversion is."""

from wavlm_jax.convert.verify import Proof
from wavlm_jax.weights import Weights

_LICENCE = (
    "The weights have the licence of whoever trained them; this export adds none. For WavLM's released weights the "
    "sources disagree: the authors' code is MIT, the model cards on the Hugging Face hub say CC BY-SA 3.0 "
    "(microsoft/unilm issue 1757, open). Weights that you trained yourself are yours, within the terms of your data."
)
_INPUT = {
    True: "Speech at 16 kHz, each wave normalised to mean 0 and variance 1 first (`do_normalize`).",
    False: "Speech at 16 kHz, not normalised (`do_normalize` is false).",
}
_USE = """## Use

```python
import transformers, wavlm_jax

transformers.AutoModel.from_pretrained(FOLDER)  # PyTorch
wavlm_jax.load(FOLDER)  # JAX
```"""


def model_card(weights: Weights, dtype: str, proof: Proof) -> str:
    """Markdown with the hub's metadata at its head."""
    config = weights.config
    kind = weights.task.kind if weights.task else "WavLMModel" if config.position_bias else "HubertModel"
    sections = [
        "---\nlibrary_name: transformers\ntags:\n- speech\n- wavlm\n- jax\n---",
        f"# {kind}, {config.num_hidden_layers} layers of width {config.hidden_size}",
        f"{_INPUT[config.do_normalize]} Written by wavlm_jax in {dtype}.",
        _USE,
        "## Where it comes from\n\n" + _list([f"source: {weights.origin.dialect}", *weights.origin.notes]),
    ]
    if weights.origin.facts:
        sections.append("## Training\n\n" + _list([f"{key}: {value}" for key, value in weights.origin.facts.items()]))
    sections += [
        "## Conventions\n\n" + _list(conventions(weights)),
        "## How exact the conversion is\n\n" + _list(proof.lines()),
        "## Licence\n\n" + _LICENCE,
    ]
    return "\n\n".join(sections) + "\n"


def conventions(weights: Weights) -> list[str]:
    """Which switches are on, a line each: where the sources differ, and what this model follows (docs/parity.md)."""
    config = weights.config
    lines = [
        f"padding: {config.padding}",
        f"do_normalize: {config.do_normalize}, normalize_eps {config.normalize_eps:g}",
        f"layerdrop_first: {config.layerdrop_first}, feature_grad_mult {config.feature_grad_mult:g} (training only)",
    ]
    if weights.task is not None:
        head = weights.task.config
        lines.append(f"head: compat {head.compat}, layer_sum_states {head.layer_sum_states}")
    if weights.head is not None:
        lines.append(f"pre-training head: {weights.head['label_embeddings'].shape[0]} label embeddings")
    return lines


def _list(lines: list[str]) -> str:
    return "\n".join(f"* {' '.join(line.split())}" for line in lines)
