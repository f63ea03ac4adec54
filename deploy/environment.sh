# shellcheck shell=bash
# Where everything lies, and how the scripts of this folder speak: sourced by all of them, never run.
#
# The services compute the same defaults in Python; whoever exports a variable moves that part, for the
# scripts and for the services alike. Nothing is written outside the checkout and TIERLINE_HOME.
# Paths and results go to stdout, everything meant for a person to stderr.

# shellcheck disable=SC2034  # read by the scripts that source this file
CHECKOUT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
: "${TIERLINE_HOME:=${XDG_STATE_HOME:-${HOME:?set HOME or TIERLINE_HOME}/.local/state}/tierline}"
: "${TIERLINE_CACHE:=$TIERLINE_HOME/cache}"
: "${TIERLINE_MODELS:=$TIERLINE_CACHE/models}"
PIP_CACHE_DIR=$TIERLINE_CACHE/pip
PIP_DISABLE_PIP_VERSION_CHECK=1
export TIERLINE_HOME TIERLINE_CACHE TIERLINE_MODELS PIP_CACHE_DIR PIP_DISABLE_PIP_VERSION_CHECK

note() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }

fail() {
  note "$*"
  exit 1
}

# hold_lock FD FILE: one process at a time past this line; the lock ends with the process, however it ends.
hold_lock() {
  flock --nonblock "$1" && return
  note "waiting for another process that holds $2"
  flock "$1"
}

# install_debian PACKAGE...: installs them where that needs no question (root and apt), else returns 1.
install_debian() {
  local output
  [[ $EUID -eq 0 ]] && command -v apt-get > /dev/null || return 1
  note "installing $* with apt-get"
  output=$({ apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "$@"; } 2>&1) && return
  printf '%s\n' "$output" >&2
  return 1
}
