# Bulk mode of a plain direction: splice src -> pipe -> dst, and when it is worth it.
#
# Large reads in a row make a direction bulk, small fills in a row end that. A pipe is filled only
# when empty, so EAGAIN while filling always means "src is empty" and never "pipe is full". The
# pipes themselves are in pipe.pxi. Runs on: the worker.

cdef enum:
    # The first of two relays in a row reads 130 KiB at a time while the load is bulk.
    PROMOTE_BYTES = 131072      # a read of this size is a large one ...
    PROMOTE_READS = 8           # ... and so many in a row make a direction bulk
    DEMOTE_BYTES = 65536        # a fill below this is a small one ...
    DEMOTE_FILLS = 16           # ... and so many in a row end bulk mode


# Decide by one more read in copy mode whether a direction is bulk.
cdef inline void splice_judge(Worker* w, Way* way, ssize_t got) noexcept nogil:
    if got < PROMOTE_BYTES:
        way.streak = 0
    elif w.core.use_splice and not way.no_splice and not way.bulk:
        way.streak += 1
        if way.streak >= PROMOTE_READS:
            way.bulk = 1
            way.streak = 0
            add_own64(&w.counters.splice_promotions, 1)


# -> 1 if the way holds a pipe or could get one.
cdef inline bint splice_has_pipe(Worker* w, Way* way) noexcept nogil:
    return way.pipe_read >= 0 or pipe_take(w, way)


# Bulk mode, first half: socket to empty pipe.
cdef ssize_t splice_fill(Worker* w, Flow* flow, uint32_t slot, int index) noexcept nogil:
    cdef Way* way = &flow.ways[index]
    cdef Leg* src = &flow.legs[index]
    cdef ssize_t got = sys_splice(src.fd, way.pipe_write, way.pipe_size)
    if got == 0:
        return way_end(w, flow, slot, index)
    if got == -EAGAIN:
        src.bits &= ~<uint32_t>MAY_READ
        return 0
    if got == -EINVAL or got == -ENOSYS:
        way.no_splice = 1           # these sockets cannot; recv and send will tell the rest
        way.bulk = 0
        return 1
    if got < 0:
        return flow_reset(w, flow, slot, index, <int>-got)
    way.pipe_bytes = <uint32_t>got
    add_own64(&w.counters.parked_bytes, got)
    flow.active_ms = w.now_ms
    if got >= DEMOTE_BYTES:
        way.streak = 0
    else:
        way.streak += 1
        if way.streak >= DEMOTE_FILLS:
            way.bulk = 0
            way.streak = 0
    return got


# Bulk mode, second half: pipe to socket. Bytes count as progress once, when read.
cdef ssize_t splice_drain(Worker* w, Flow* flow, uint32_t slot, int index) noexcept nogil:
    cdef Way* way = &flow.ways[index]
    cdef Leg* dst = &flow.legs[1 - index]
    cdef ssize_t sent = sys_splice(way.pipe_read, dst.fd, way.pipe_bytes)
    if sent == -EAGAIN or sent == 0:
        dst.bits &= ~<uint32_t>MAY_WRITE
        return 0
    if sent < 0:
        return flow_break(w, flow, slot, 1 - index, <int>-sent)
    way.pipe_bytes -= <uint32_t>sent
    take_own64(&w.counters.parked_bytes, sent)
    way_account(w, flow, index, sent)
    return 1
