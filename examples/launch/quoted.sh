# shellcheck shell=bash
# Read by the scripts that make overrides of variables.

# quoted VALUE: as Hydra reads it back: a path in quotes, a list ['a','b'] as it is.
quoted() {
    local quote="'"
    case $1 in
        \[*) printf %s "$1" ;;
        *) printf "'%s'" "${1//$quote/\\$quote}" ;;
    esac
}
