"""The laboratory: studies, benchmarks, tables of models and ablations, loss curves. No other layer imports it."""
