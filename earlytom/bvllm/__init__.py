"""B-VLLM as pure functions: merging of candidate frames and of their tokens (`frames`), its Q-Former (`qformer`), and
the whole published path with trained weights (`path`). `earlytom.methods.published.bvllm` is an approximation without
trained weights."""
