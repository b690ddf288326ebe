"""Files, configs and names that mean harm: what they ask for never happens."""
