"""Low-latency runtime: a compiled vision engine chained with the LLM decoder."""
