"""One run on Ray Train, from its settings to a registered version."""
