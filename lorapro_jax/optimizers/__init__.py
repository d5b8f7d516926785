"""The optimizers: for each a rule on arrays, and the factories that users call."""
