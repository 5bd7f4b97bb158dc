#!/bin/sh
# Builds this folder's TensorRT engine on the device that will run it.
#
#   sh build_engine.sh                    builds the engines, writes what they are beside them
#   sh build_engine.sh --precision fp16   TensorRT 8 alone: fp32, fp16, int8 (of a quantised graph), best
#   sh build_engine.sh --layer-times      then times every layer
#   sh build_engine.sh --dry-run          only prints the commands
#
# Needs trtexec (tensorrt_rtx for TensorRT-RTX): in PATH, in $TRTEXEC, or in /usr/src/tensorrt/bin.
set -eu

# @facts@

fail() {
    echo "build_engine.sh: $*" >&2
    exit 1
}

usage() {
    sed -n 's/^# \{0,1\}//p' "$0" | sed -n '2,9p'
}

precision=$PRECISION
chosen=
times=
dry=
while [ $# -gt 0 ]; do
    case "$1" in
        --precision)
            [ $# -ge 2 ] || fail "--precision needs one of fp32, fp16, int8, best"
            precision=$2 chosen=yes
            shift
            ;;
        --layer-times) times=yes ;;
        --dry-run) dry=yes ;;
        -h | --help)
            usage
            exit 0
            ;;
        *) fail "no option $1; see --help" ;;
    esac
    shift
done
case "$precision" in
    fp32 | fp16 | int8 | int8+fp16 | best) ;;
    *) fail "no precision $precision; one of fp32, fp16, int8, best" ;;
esac
cd "$(dirname "$0")"
[ -f "$MODEL" ] || fail "$MODEL is missing here"

tool=trtexec
[ -z "$RTX" ] || tool=tensorrt_rtx
program=${TRTEXEC:-}
if [ -z "$program" ]; then
    if command -v "$tool" >/dev/null 2>&1; then
        program=$tool
    elif [ -x "/usr/src/tensorrt/bin/$tool" ]; then
        program=/usr/src/tensorrt/bin/$tool
    else
        fail "$tool was found neither in PATH nor in /usr/src/tensorrt/bin; install TensorRT, or set TRTEXEC to its path"
    fi
fi

# its first line holds [TensorRT v8502], [TensorRT v100300] or [TensorRT v11.1.0.106]
banner=$("$program" --help 2>&1 | sed -n 's/.*\[TensorRT[^]]* v\([0-9][0-9.]*\)\].*/\1/p' | sed -n 1p)
case "$banner" in
    *.*.*) dotted=$(echo "$banner" | cut -d. -f1-3) ;;
    [0-9][0-9][0-9][0-9])
        dotted=$((banner / 1000)).$((banner / 100 % 10)).$((banner % 100))
        ;;
    [0-9][0-9][0-9][0-9][0-9] | [0-9][0-9][0-9][0-9][0-9][0-9])
        dotted=$((banner / 10000)).$((banner / 100 % 100)).$((banner % 100))
        ;;
    *) dotted= ;;
esac
if [ -n "$RTX" ]; then
    # it has few of trtexec's flags, and compiles its kernels at run time
    weak='' typed='' workspace_flag='' build_only=--skipInference several='' versions_flag='' hardware_flag=''
else
    [ -n "$dotted" ] || fail "$program does not tell its version; its help begins with no [TensorRT v...]"
    major=${dotted%%.*}
    rest=${dotted#*.}
    version=$((major * 100 + ${rest%%.*}))
    # @dialects@
    else
        fail "$program is of TensorRT $dotted; this script knows 8.2 and later"
    fi
    if [ "$major" != "${MADE_FOR%%.*}" ]; then
        echo "build_engine.sh: this graph was made for TensorRT $MADE_FOR; here is $dotted" >&2
    fi
fi

set --
if [ -n "$weak" ]; then
    case "$precision" in
        fp16) set -- --fp16 ;;
        int8) set -- --int8 ;;
        int8+fp16) set -- --int8 --fp16 ;;
        best) set -- --best ;;
    esac
    if [ "$precision" = int8 ] || [ "$precision" = best ]; then
        [ -n "$QUANTIZED" ] || fail "$MODEL holds no INT8 ranges, so INT8 would be of no use; --precision fp16 is there"
    fi
elif [ -n "$chosen" ]; then
    fail "--precision is for TensorRT 8; here the graph decides its precision"
fi
[ -z "$typed" ] || set -- "$@" "$typed"
[ -z "$WORKSPACE" ] || [ -z "$workspace_flag" ] || set -- "$@" "$workspace_flag$WORKSPACE"
if [ -n "$VERSIONS" ]; then
    [ -n "$versions_flag" ] || fail "version-compatible engines are asked for; TensorRT $dotted builds none"
    set -- "$@" "$versions_flag"
fi
if [ -n "$HARDWARE" ] && [ -z "$RTX" ]; then
    [ -n "$hardware_flag" ] || fail "engines for other GPUs are asked for; TensorRT $dotted builds none"
    set -- "$@" "$hardware_flag$HARDWARE"
fi
[ -n "$RTX" ] || set -- "$@" --timingCacheFile=timing.cache --profilingVerbosity=detailed

# build OUTPUT SHAPES BATCHES FLAG...
build() {
    output=$1 shapes=$2 batches=$3
    shift 3
    [ -n "$RTX" ] || set -- "$@" "--exportLayerInfo=$output.layers.json"
    # $shapes is quoted words, split as the shell would
    eval "set -- \"--onnx=\$MODEL\" \"--saveEngine=\$output.new\" $shapes \"\$@\" \"\$build_only\""
    echo "$program $*"
    [ -z "$dry" ] || return 0
    if ! "$program" "$@" >"$output.log" 2>&1; then
        said=$(sed -n '/\[E\]/p' "$output.log" | sed 3q)
        echo "${said:-$(tail -n 3 "$output.log")}" >&2
        rm -f "$output.new"
        fail "$program could not build $output; all it said is in $output.log"
    fi
    [ -f "$output.new" ] || fail "$program wrote no engine; see $output.log"
    mv "$output.new" "$output"
    describe "$output" "$batches"
    echo "built $output"
}

# what the log says after its name, without quotes and backslashes
told() {
    sed -n "s/.*\[I\] $1: *//p" "$2" | sed -n 1p | tr -d '"\\'
}

# one JSON member, nothing when the value is not known
member() {
    [ -z "$2" ] || printf '"%s": "%s", ' "$1" "$2"
}

describe() {
    hash=
    if command -v sha256sum >/dev/null 2>&1; then
        hash=$(sha256sum "$1" | cut -d' ' -f1)
    fi
    title="TensorRT${RTX:+-RTX}"
    level=${HARDWARE:-none}
    [ "$level" != sameComputeCapability ] || level=same-capability
    [ -z "$RTX" ] || level=ampere+
    {
        printf '{'
        member builder "${dotted:+$title $dotted}"
        member compute_capability "$(told 'Compute Capability' "$1.log")"
        member device "$(told 'Selected Device' "$1.log")"
        member sha256 "$hash"
        [ -z "$weak" ] || member precision "$precision"
        printf '"batch": [%s], ' "$(echo "$2" | sed 's/ /, /g')"
        printf '"hardware_compatibility": "%s", ' "$level"
        printf '"version_compatible": %s}\n' "$(if [ -n "$VERSIONS" ]; then echo true; else echo false; fi)"
    } >"$1.json.new"
    mv "$1.json.new" "$1.json"
}

# time_layers ENGINE SHAPES
time_layers() {
    eval "set -- \"--loadEngine=\$1\" \"--exportProfile=\$1.times.json\" $2"
    [ "${major:-11}" -ge 11 ] || set -- "$@" --separateProfileRun
    echo "$program $*"
    [ -z "$dry" ] || return 0
    "$program" "$@" >times.log 2>&1 || fail "$program could not time the layers; all it said is in times.log"
}

dynamic=$SHAPES
if [ -n "$PROFILES" ] && [ -n "$several" ]; then
    dynamic=$PROFILES
fi
build "$ENGINE" "$dynamic" "$BATCH" "$@"
[ -z "$STATIC_ENGINE" ] || build "$STATIC_ENGINE" "$STATIC_SHAPES" "1 1 1" "$@"
if [ -n "$times" ]; then
    [ -z "$RTX" ] || fail "--layer-times is for trtexec"
    time_layers "$ENGINE" "$RUN_SHAPES"
fi
echo "check it: python3 infer.py --engine $ENGINE --selftest"
