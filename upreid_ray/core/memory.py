"""How the C library of workers on CPUs treats memory; this module does not import torch."""

# Environment variables with which the C library of Linux keeps what a step frees for the next
# one. By default it returns large blocks to the kernel, which zeroes each page before it hands
# it out again: a sixth of the time of a step on two cores. One arena, because all others return
# what is larger than 64 MiB nevertheless. The Makefile sets the same for the benchmarks.
KEEP_FREED_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),  # bytes
}
