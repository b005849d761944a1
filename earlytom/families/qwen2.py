"""Sizes of the Qwen2 language models in published models of several families."""


def _sizes(hidden: int, inner: int, layers: int, heads: int, keys: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
    }


QWEN2_SMALL, QWEN2_7B = _sizes(896, 4864, 24, 14, 2), _sizes(3584, 18944, 28, 28, 4)  # the first has 0.5B
