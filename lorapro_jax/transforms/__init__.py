"""From optimizer rules on arrays to Optax transforms of trees."""
