# The buffers that workers read into and park bytes in: one mapping for each worker.

cdef enum:
    # One recv. Two relays in a row, bulk, copying: CPU seconds per GB at 128 KiB 0.77,
    # 256 KiB 0.65, 512 KiB 0.60, 1 MiB 0.59; throughput best at 512 KiB. docs/engine.md.
    BUFFER_BYTES = 524288
    WARM_BUFFERS = 4            # per worker; free buffers that may stay resident (2 MiB)


cdef inline char* buffer_at(Worker* w, int32_t index) noexcept nogil:
    return w.buffers + <size_t>index * BUFFER_BYTES


# -> pool index, -1 if the pool is dry. Runs on: the worker.
cdef inline int32_t buffer_take(Worker* w) noexcept nogil:
    if w.free_buffers == 0:
        return -1
    w.free_buffers -= 1
    return w.buffer_stack[w.free_buffers]


# A buffer given back while many are free leaves memory: a burst of slow readers must not
# stay resident for ever. Runs on: the worker.
cdef inline void buffer_give(Worker* w, int32_t index) noexcept nogil:
    NP_BUG(w.free_buffers >= MAX_BUFFERS, &w.counters.bugs, b"buffer given twice")
    if w.counters.buffers_in_use > WARM_BUFFERS:
        sys_forget(buffer_at(w, index), BUFFER_BYTES)
    elif NP_DEBUG:
        memset(buffer_at(w, index), 0xDD, BUFFER_BYTES)
    w.buffer_stack[w.free_buffers] = index
    w.free_buffers += 1
