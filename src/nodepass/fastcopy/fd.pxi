# Which descriptors of the process are the engine's: none is handed over twice.

cdef enum:
    MAX_TAKEN = 1 << 20         # descriptors that are looked after: the kernel's fs.nr_open


# Note that a descriptor is the engine's, or no more. A page of the table has room for 1024.
# Runs on: control plane, before a flow is handed over; the worker, before it closes.
cdef inline void fd_mark(Core* core, int fd, uint32_t is_ours) noexcept nogil:
    if 0 <= fd < MAX_TAKEN:
        publish_release32(&core.taken[fd], is_ours)


# -> 1 a descriptor is the engine's already: whoever hands it over once more has lost count.
cdef inline bint fd_is_taken(Core* core, int fd) noexcept nogil:
    return 0 <= fd < MAX_TAKEN and load_acquire32(&core.taken[fd])


# Close one that is not marked any more. Runs on: the worker.
cdef inline void fd_close(Worker* w, int fd) noexcept nogil:
    NP_BUG(sys_close(fd) == -EBADF, &w.counters.bugs, b"closed a stranger's descriptor")
    take_own64(&w.counters.fds_open, 1)
