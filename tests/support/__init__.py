"""What tests share: oracles, layouts, models, trees, runs. No test is in here."""
