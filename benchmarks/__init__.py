"""Benchmarks of `lorapro_jax`; each module runs as `python -m benchmarks.<name>`."""
