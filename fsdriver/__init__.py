"""The kernel's protocol: a mount of a repository through pyfuse3 on trio.

`daemon` serves a mount, `operations` answers the kernel, `channel` owns the connection to it,
`control` answers the command line. What the command line uses is light, and imports neither
pyfuse3 nor trio: `messages`, `client`, `launch`, `mountpoint`.
"""
