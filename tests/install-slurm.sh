#!/usr/bin/env bash
# Installs the Debian packages that the tests' Slurm cluster is made of, when they are missing.
# Does nothing without root or apt-get, except to say what is missing; with CI=true that is fatal.
set -euo pipefail

commands=(slurmctld slurmd sbatch slurmdbd munged mariadbd)
packages=(slurmctld slurmd slurm-client slurmdbd munge mariadb-server)
# Some distributions leave sbin out of a user's PATH.
PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin"

missing() {
    for command in "${commands[@]}"; do
        command -v "$command" >/dev/null || echo "$command"
    done
}

[[ -z "$(missing)" ]] && exit 0

if [[ "$(id -u)" == 0 ]] && command -v apt-get >/dev/null; then
    echo "installing ${packages[*]}" >&2
    # The tests start their own daemons; the system's services must stay down.
    policy=/usr/sbin/policy-rc.d
    if [[ ! -e "$policy" ]]; then
        trap 'rm -f "$policy"' EXIT
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod +x "$policy"
    fi
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq >&2
    apt-get install -qq -y --no-install-recommends "${packages[@]}" >&2
fi

left="$(missing)"
[[ -z "$left" ]] && exit 0
echo "no ${left//$'\n'/, } here: the tests that need a Slurm cluster cannot run" >&2
[[ "${CI:-}" != true ]]
