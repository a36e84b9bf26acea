"""What the tools share: arguments, configs, errors, and checks of what a config names."""
