"""Tests of lorapro_jax, in the rooms of the package; `support` has their helpers."""
