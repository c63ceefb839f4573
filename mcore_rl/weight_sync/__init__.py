"""Moving the trained weights to the rollout engine. Light: engines may import `base`."""
