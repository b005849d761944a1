"""B-VLLM as pure functions: frames chosen by a question and merged (`frames`), its Q-Former (`qformer`), and the whole
published path with trained weights (`path`). `earlytom.methods.published.bvllm` is a likeness of it that has none of
them."""
