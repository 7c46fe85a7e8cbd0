"""What a training checks before weights load: the GPU's driver and libraries, shared memory, disk, host memory.

A check that cannot find out passes: it refuses what is known to fail, and nothing else.
"""
