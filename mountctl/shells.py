"""Completion for bash, zsh and fish, on click's own, with scripts that take a shell's word for it.

click's scripts know nothing of the :, at which bash cuts words, of `--option=` before a path, or
of a command behind `--`. What a shell sends is its command line up to the cursor; what it gets is
lines of a type (plain, file, dir, or command: as the shell completes commands) and a value.
Loaded only to print a script and to answer one.
"""

import os
from typing import Any

from click.shell_completion import (
    BashComplete,
    CompletionItem,
    FishComplete,
    ShellComplete,
    ZshComplete,
    add_completion_class,
    split_arg_string,
)

from mountctl.invocation import COMPLETE_VARIABLE

_CURSOR = "\1"
_BASH = r"""_mountctl_completion() {
    local program=$1 line=${COMP_LINE:0:COMP_POINT} type value i
    type -P -- "$program" >/dev/null || program=mountctl
    COMPREPLY=()
    while IFS=, read -r type value; do
        case $type in
            plain) COMPREPLY+=("$value") ;;
            dir) compopt -o dirnames ;;
            file) compopt -o default ;;
            command)
                for ((i = 1; i < COMP_CWORD; i++)); do
                    [[ ${COMP_WORDS[i]} != -- ]] || break
                done
                if declare -F _command_offset >/dev/null; then
                    _command_offset $((i + 1))
                elif ((i + 1 == COMP_CWORD)); then
                    mapfile -t COMPREPLY < <(compgen -c -- "${COMP_WORDS[COMP_CWORD]}")
                else
                    compopt -o default
                fi
                ;;
        esac
    done < <(env COMP_LINE="$line" COMP_WORDBREAKS="$COMP_WORDBREAKS" \
        %(complete_var)s=bash_complete "$program" 2>/dev/null)
}

complete -o nosort -F _mountctl_completion mountctl
"""
_ZSH = r"""#compdef mountctl

_mountctl() {
    local program=${(Q)words[1]} line="${(j: :)words[1,CURRENT-1]} $PREFIX" type key descr
    local -a plain described response
    whence -p -- $program >/dev/null || program=mountctl
    response=("${(@f)$(COMP_LINE="$line" %(complete_var)s=zsh_complete $program 2>/dev/null)}")
    [[ $PREFIX != --*=* ]] || compset -P '*='
    for type key descr in "${response[@]}"; do
        case $type in
            plain)
                if [[ $descr == _ ]]; then plain+=("$key"); else described+=("$key:$descr"); fi
                ;;
            dir) _path_files -/ ;;
            file) _path_files -f ;;
            command)
                local -i end=${words[(ie)--]}
                shift $end words
                (( CURRENT -= end ))
                _normal
                return
                ;;
        esac
    done
    (( ! $#described )) || _describe -V unsorted described
    (( ! $#plain )) || compadd -V unsorted -a plain
}

# As the file _mountctl in $fpath this is run by the first Tab, and has just replaced itself.
if [[ $zsh_eval_context[-1] == loadautofunc ]]; then
    _mountctl "$@"
else
    compdef _mountctl mountctl
fi
"""
_FISH = r"""function _mountctl_completion
    set -l line (commandline -cp | string collect)
    set -l option (string match -r -- '^--[^=]*=' (commandline -ct))
    env COMP_LINE="$line" %(complete_var)s=fish_complete mountctl 2>/dev/null | while read -l each
        set -l parts (string split -m 1 , -- $each)
        switch $parts[1]
            case plain
                printf '%%s\n' "$option$parts[2]"
            case dir
                for path in (__fish_complete_directories $parts[2] '')
                    printf '%%s\n' "$option$path"
                end
            case file
                for path in (__fish_complete_path $parts[2] '')
                    printf '%%s\n' "$option$path"
                end
            case command
                complete -C (string replace -r -- '^.*? -- +' '' "$line")
        end
    end
end

complete --no-files --keep-order --command mountctl --arguments '(_mountctl_completion)'
"""


class _Line(ShellComplete):
    """A shell that sends its command line up to the cursor as COMP_LINE."""

    def get_completion_args(self) -> tuple[list[str], str]:
        words = split_arg_string(os.environ.get("COMP_LINE", "") + _CURSOR)
        # What a shell would have made of the words before; `--store ~/store` counts.
        return [os.path.expanduser(word) for word in words[1:-1]], words[-1].replace(_CURSOR, "")

    def get_completions(self, args: list[str], incomplete: str) -> list[CompletionItem[str]]:
        items = super().get_completions(list(args), incomplete)
        if "--" in args or not any(item.type == "command" for item in items):
            return items
        return [CompletionItem("--", help="and a command")]

    def complete(self) -> str:
        try:
            return super().complete()
        except Exception:  # noqa: BLE001 - a shell that completes shows no error
            return ""


@add_completion_class
class _Bash(_Line, BashComplete):
    source_template = _BASH

    def source(self) -> str:
        return self.source_template % self.source_vars()  # any bash may be asked for its script

    def format_completion(self, item: CompletionItem[Any]) -> str:
        """Leaves out what stands before the place where bash thinks that the word begins.

        That is behind a : or =; an @ would be one more, but readline keeps it with the word.
        """
        word = os.environ.get("COMP_LINE", "").rpartition(" ")[2]
        breaks = set(":=") & set(os.environ.get("COMP_WORDBREAKS", ""))
        cut = max((word.rfind(character) + 1 for character in breaks), default=0)
        before = word[:cut]
        if before.startswith("--") and "=" in before:
            before = before.partition("=")[2]  # click gives the value alone
        value = item.value.removeprefix(before) if not set("'\"") & set(word) else item.value
        return f"{item.type},{value}"


@add_completion_class
class _Zsh(_Line, ZshComplete):
    source_template = _ZSH


@add_completion_class
class _Fish(_Line, FishComplete):
    source_template = _FISH


SHELLS = {"bash": _Bash, "zsh": _Zsh, "fish": _Fish}


def script(shell: str) -> str:
    """Returns the script that makes a shell complete mountctl's command lines."""
    from mountctl.__main__ import cli

    return SHELLS[shell](cli, {}, "mountctl", COMPLETE_VARIABLE).source()
