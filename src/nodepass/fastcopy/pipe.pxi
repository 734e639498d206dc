# Pipes for splice: taken when a bulk direction reads, given back as soon as they are empty.
#
# A pipe is therefore held across turns only while the receiver is slow; an idle flow holds
# none. A pipe with bytes inside is never pooled: the next user would deliver them.

cdef enum:
    # The largest an unprivileged user may ask for by default. Two relays in a row, bulk: CPU
    # seconds per GB with 1 MiB 0.50, 512 KiB 0.52, 256 KiB 0.57; copying 0.60.
    PIPE_BYTES = 1048576
    PIPE_BYTES_SMALL = 262144   # when the user's budget is used up; below it copying is no worse
    MAX_PIPES = 128             # per worker, held and pooled: at most 256 fds
    PIPES_DRY_MS = 1000         # after a failure nobody asks again for this long


# -> 1 and the way holds an empty pipe, 0 if none is to be had (then: recv and send).
# Runs on: the worker.
cdef int pipe_take(Worker* w, Way* way) noexcept nogil:
    cdef Pipe* pipe
    cdef int fds[2]
    cdef int size = -EPERM
    if w.pooled:
        w.pooled -= 1
        pipe = &w.pool[w.pooled]
        way.pipe_read = pipe.read
        way.pipe_write = pipe.write
        way.pipe_size = pipe.size
        take_own64(&w.counters.pipes_pooled, 1)
        add_own64(&w.counters.pipes_in_use, 1)
        return 1
    if w.counters.pipes_in_use >= MAX_PIPES or w.now_ms < w.pipes_dry_until_ms:
        return 0
    if sys_pipe(fds) < 0:
        w.pipes_dry_until_ms = w.now_ms + PIPES_DRY_MS
        return 0
    add_own64(&w.counters.fds_open, 2)
    if w.pipes_large < w.core.large_pipes:
        size = sys_pipe_grow(fds[1], PIPE_BYTES)
    if size < 0:
        size = sys_pipe_grow(fds[1], PIPE_BYTES_SMALL)
    if size < 0:
        fd_close(w, fds[0])
        fd_close(w, fds[1])
        w.pipes_dry_until_ms = w.now_ms + PIPES_DRY_MS
        return 0
    if size >= PIPE_BYTES:
        w.pipes_large += 1
    way.pipe_read = fds[0]
    way.pipe_write = fds[1]
    way.pipe_size = <uint32_t>size
    add_own64(&w.counters.pipes_in_use, 1)
    return 1


# The way lets go of its pipe: clean ones are pooled, dirty and surplus ones closed.
# Runs on: the worker.
cdef void pipe_give(Worker* w, Way* way) noexcept nogil:
    cdef Pipe* pipe
    if way.pipe_bytes == 0 and w.pooled < MAX_POOLED_PIPES:
        pipe = &w.pool[w.pooled]
        pipe.read = way.pipe_read
        pipe.write = way.pipe_write
        pipe.size = way.pipe_size
        w.pooled += 1
        add_own64(&w.counters.pipes_pooled, 1)
    else:
        pipe_close(w, way.pipe_read, way.pipe_write, way.pipe_size)
    take_own64(&w.counters.pipes_in_use, 1)
    way.pipe_read = -1
    way.pipe_write = -1
    way.pipe_bytes = 0


cdef void pipe_close(Worker* w, int read, int write, uint32_t size) noexcept nogil:
    if size >= PIPE_BYTES:
        w.pipes_large -= 1
    fd_close(w, read)
    fd_close(w, write)


# Close every pooled pipe. Runs on: the worker, as it leaves.
cdef void pipe_close_all(Worker* w) noexcept nogil:
    cdef Pipe* pipe
    while w.pooled:
        w.pooled -= 1
        pipe = &w.pool[w.pooled]
        pipe_close(w, pipe.read, pipe.write, pipe.size)
        take_own64(&w.counters.pipes_pooled, 1)
