"""The commands of `mountctl`: one module each, loaded when it is called, named `command`."""
