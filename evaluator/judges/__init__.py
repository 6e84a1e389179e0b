"""Who judges, and how each judge is asked: local models, AlpacaEval, judges trained here, the refusal rule."""
