# shellcheck shell=bash
# What the scripts share. Sourced first by each; sets ROOT, ends at the first error.
set -euo pipefail
shopt -s inherit_errexit extglob

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export ROOT

# What is kept between runs and is no part of the repository.
# shellcheck disable=SC2034 # used by those who source this
CACHE=${XDG_CACHE_HOME:-${HOME:-/var/cache}/.cache}/amalgamfs

note() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }

die() { # MESSAGE [HINT]
    note "$1"
    [[ -z ${2:-} ]] || printf 'hint: %s\n' "$2" >&2
    exit 1
}

# Microseconds, without starting a process.
now() { printf '%s' "${EPOCHREALTIME/[.,]/}"; }

seconds_since() { # MICROSECONDS
    local ms=$((($(now) - $1) / 1000))
    printf '%d.%02d' $((ms / 1000)) $((ms % 1000 / 10))
}

mounts_under() { # DIR: mount points below it, innermost first
    local line
    while read -r line; do
        printf -v line '%b' "$line" # a space is written \040
        [[ $line != "$1"/* ]] || printf '%s\n' "$line"
    done < <(cut -d' ' -f5 /proc/self/mountinfo | tac)
}

# Takes away what a run left mounted, then its directory. Never deletes through a mount.
remove_run() { # DIR
    local mount
    while read -r mount; do
        fusermount3 -uz "$mount" 2>/dev/null || umount -l "$mount" 2>/dev/null || true
    done < <(mounts_under "$1")
    [[ -z $(mounts_under "$1") ]] || { note "still mounted, so kept: $1"; return 1; }
    rm -rf --one-file-system "$1"
}
