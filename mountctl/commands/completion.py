"""`mountctl completion`."""

import click

from mountctl.command import Command, pass_invocation
from mountctl.invocation import Invocation


@click.command(
    "completion",
    cls=Command,
    example="""
    $ mountctl completion bash > ~/.local/share/bash-completion/completions/mountctl
    $ mountctl completion zsh > ~/.zfunc/_mountctl
    $ mountctl completion fish > ~/.config/fish/completions/mountctl.fish
    """,
)
@click.argument(
    "shell",
    type=click.Choice(["bash", "zsh", "fish"]),
    metavar="SHELL",
    help="The shell: bash, zsh or fish.",
)
@pass_invocation
def command(invocation: Invocation, shell: str) -> None:
    """Print the script that lets a shell complete commands.

    Commands, options, snapshots, refs, sessions, episodes and paths are completed, from the store
    that the line names. Nothing is changed and no daemon asked.

    \b
    Where it belongs, so that every new shell has it:
      bash  ~/.local/share/bash-completion/completions/mountctl, with the
            package bash-completion; without it, a line in ~/.bashrc:
            eval "$(mountctl completion bash)"
      zsh   a file _mountctl in a directory of $fpath, before compinit in
            ~/.zshrc: fpath=(~/.zfunc $fpath); autoload -Uz compinit; compinit
      fish  ~/.config/fish/completions/mountctl.fish
    """
    from mountctl.shells import script

    text = script(shell)
    if invocation.output.json:
        invocation.output.result({"shell": shell, "script": text})
    else:
        invocation.output.raw(text.encode())
