#!/usr/bin/env bash
# Installs the Debian packages that the tests' Slurm cluster and its containers are made of, and a
# compiler, when they are missing. Does nothing without root or apt-get, except to say what is missing;
# with CI=true that is fatal. Whether a Docker daemon can start here is for the tests to find out.
set -euo pipefail

slurm=(slurmctld slurmd sbatch slurmdbd munged mariadbd)
docker=(docker dockerd)
compiler=(c++ g++)
packages=(g++ slurmctld slurmd slurm-client slurmdbd munge mariadb-server docker.io)
# Some distributions leave sbin out of a user's PATH.
PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin"

missing() { # of these commands
    for command in "$@"; do
        command -v "$command" >/dev/null || echo "$command"
    done
}

[[ -z "$(missing "${slurm[@]}" "${docker[@]}" "${compiler[@]}")" ]] && exit 0

if [[ "$(id -u)" == 0 ]] && command -v apt-get >/dev/null; then
    # The tests start their own daemons; the system's services must stay down.
    policy=/usr/sbin/policy-rc.d
    if [[ ! -e "$policy" ]]; then
        trap 'rm -f "$policy"' EXIT
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod +x "$policy"
    fi
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq >&2
    # Since Debian 13 the client is a package of its own.
    ! apt-cache show docker-cli >/dev/null 2>&1 || packages+=(docker-cli)
    echo "installing ${packages[*]}" >&2
    apt-get install -qq -y --no-install-recommends "${packages[@]}" >&2
fi

lacking=0
tell() { # what cannot run without which of these commands
    local what=$1 left
    shift
    left=$(missing "$@")
    [[ -n "$left" ]] || return 0
    echo "no ${left//$'\n'/, } here: $what cannot run" >&2
    lacking=1
}
tell 'the tests that need a Slurm cluster' "${slurm[@]}"
tell 'the tests that need a container' "${docker[@]}"
tell 'the tests of what is compiled' "${compiler[@]}"
[[ "$lacking" == 0 || "${CI:-}" != true ]]
