#!/usr/bin/env bash
# Installs the PostgreSQL server that the tests start for themselves, unless there is one. Where it
# cannot, it says why, and the tests on PostgreSQL are skipped; in CI that is a failure.
set -euo pipefail

without() {
    echo "Tests on PostgreSQL will be skipped: no server is installed, and $1." >&2
    echo "Install one by hand (it needs initdb and pg_ctl), or set TEST_POSTGRES_URL." >&2
    [ "${CI:-}" != true ]
    exit
}

[ -z "${TEST_POSTGRES_URL:-}" ] || exit 0
if command -v initdb >/dev/null || ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1; then
    exit 0
fi
command -v apt-get >/dev/null || without "there is no apt-get to install it"
[ "$(id -u)" -eq 0 ] || without "only root may install it"
echo "Installing a PostgreSQL server for the tests." >&2
export DEBIAN_FRONTEND=noninteractive
if ! { apt-get update -q && apt-get install -y -q --no-install-recommends postgresql; }; then
    without "apt-get could not install it"
fi
