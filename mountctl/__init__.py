"""The command line, `mountctl`: the only part that meets the terminal and the environment.

`__main__` names the commands, each a module of `commands` that is loaded when it is called.
`access` decides whether a mount's daemon or this process does what was asked, `mounts` starts
and ends daemons, `failures` gives every error its exit code and its hint, `output` is the way
to the terminal. Nobody imports this package.
"""
