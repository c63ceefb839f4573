"""Where an engine runs: `rollout.host`."""
