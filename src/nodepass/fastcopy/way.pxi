# The plain TCP pump: bytes of one direction from src to dst.
#
# Copy mode: recv into the worker's scratch buffer, send from it. What dst does not take is
# parked by handing the whole buffer over to the way; the worker takes another one. While
# something is parked the way does not read: back-pressure is the kernel's. With no buffer
# left (MAX_BUFFERS slow receivers) the worker peeks, sends, and consumes only what dst
# took, so nothing has to be kept and nobody has to wait for anybody.
#
# Bulk mode is in splice.pxi.
#
# EOF is read only when nothing is parked, hence: EOF -> SHUT_WR(dst) at once, and no byte
# can be behind it.
#
# Step functions return: > 0 bytes of progress, 0 wait for an event, < 0 the flow is buried.

cdef enum:
    # Budget of one direction in one turn, then the tail of the list. A bulk turn moves 130 to
    # 800 KiB by itself, so this bites only when a fast sender would hold the worker; 1 MiB is
    # about 0.25 ms of it.
    TURN_BYTES = 1048576


# -> 1 more to do but out of budget, 0 wait for an event, -1 the flow is buried.
# Runs on: the worker.
cdef int way_pump(Worker* w, Flow* flow, uint32_t slot, int index) noexcept nogil:
    cdef Way* way = &flow.ways[index]
    cdef Leg* src = &flow.legs[index]
    cdef Leg* dst = &flow.legs[1 - index]
    cdef ssize_t budget = TURN_BYTES
    cdef ssize_t rc = 0
    cdef int more = 0
    if way.is_tls:
        return tls_pump(w, flow, slot, index)
    while way.state == WAY_OPEN and dst.bits & MAY_WRITE:
        if way.parked != NULL:
            rc = way_send_parked(w, flow, slot, index)
        elif way.pipe_bytes:
            rc = splice_drain(w, flow, slot, index)
        elif not src.bits & MAY_READ:
            break
        elif budget <= 0:
            more = 1
            break
        elif way.bulk and not src.bits & SEEN_URGENT and splice_has_pipe(w, way):
            rc = splice_fill(w, flow, slot, index)
        else:
            rc = way_copy(w, flow, slot, index)
        if rc < 0:
            return -1
        if rc == 0:
            break
        budget -= rc
    if way.pipe_read >= 0 and way.pipe_bytes == 0:
        pipe_give(w, way)
    return more


# Copy mode: one recv, one send.
cdef ssize_t way_copy(Worker* w, Flow* flow, uint32_t slot, int index) noexcept nogil:
    cdef Way* way = &flow.ways[index]
    cdef Leg* src = &flow.legs[index]
    cdef Leg* dst = &flow.legs[1 - index]
    cdef bint is_dry = w.free_buffers == 0
    cdef ssize_t got = sys_recv(src.fd, w.scratch, BUFFER_BYTES, MSG_PEEK if is_dry else 0)
    cdef ssize_t sent
    if got == 0:
        return way_end(w, flow, slot, index)
    if got == -EAGAIN:
        src.bits &= ~<uint32_t>MAY_READ
        return 0
    if got < 0:
        return flow_reset(w, flow, slot, index, <int>-got)
    sent = sys_send(dst.fd, w.scratch, got)
    if sent < 0:
        if sent != -EAGAIN:
            return flow_break(w, flow, slot, 1 - index, <int>-sent)
        sent = 0
    way_account(w, flow, index, sent)
    if sent < got:
        dst.bits &= ~<uint32_t>MAY_WRITE    # a short write means "full": man epoll(7), Q9
    if is_dry:
        if sent and sys_recv(src.fd, w.scratch, sent, 0) != sent:
            NP_BUG(1, &w.counters.bugs, b"peeked bytes went away")
            return flow_reset(w, flow, slot, index, EIO)
    elif sent < got:
        way_park(w, way, sent, got)
    # A short read means "drained" (man epoll(7), Q9): whatever comes later is a new edge. Not
    # so if a FIN is known to be queued, or recv may have stopped at an urgent mark, or peeked
    # bytes are still there.
    if got < BUFFER_BYTES and not src.bits & (SEEN_RDHUP | SEEN_URGENT):
        if not is_dry or sent == got:
            src.bits &= ~<uint32_t>MAY_READ
    splice_judge(w, way, got)
    return sent if sent == got else 0


# EOF of src, with everything delivered: pass it on, once.
cdef ssize_t way_end(Worker* w, Flow* flow, uint32_t slot, int index) noexcept nogil:
    cdef Leg* dst = &flow.legs[1 - index]
    cdef int rc
    cdef int code
    if flow.is_breaking:
        flow.legs[index].bits &= ~<uint32_t>MAY_READ
        return 0                # its error has been taken; what looks like EOF is no FIN
    rc = sys_shutdown_write(dst.fd)
    # (See tls_send_failed() for the exception.)
    if rc < 0 and not dst.bits & TLS_NOTIFIED:
        # ENOTCONN: the connection died and its event is still on the way.
        code = sys_socket_error(dst.fd)
        if code == 0:
            code = ECONNRESET if rc == -ENOTCONN else -rc
        return flow_break(w, flow, slot, 1 - index, code)
    flow.ways[index].state = WAY_SHUT
    flow.legs[index].bits &= ~<uint32_t>MAY_READ
    return 1


# Parked bytes first: they are older than anything in the socket.
cdef ssize_t way_send_parked(Worker* w, Flow* flow, uint32_t slot, int index) noexcept nogil:
    cdef Way* way = &flow.ways[index]
    cdef Leg* dst = &flow.legs[1 - index]
    cdef size_t size = way.parked_to - way.parked_from
    cdef ssize_t sent = sys_send(dst.fd, way.parked + way.parked_from, size)
    if sent < 0:
        if sent != -EAGAIN:
            return flow_break(w, flow, slot, 1 - index, <int>-sent)
        sent = 0
    way_account(w, flow, index, sent)
    way.parked_from += sent
    take_own64(&w.counters.parked_bytes, sent)
    if <size_t>sent < size:
        dst.bits &= ~<uint32_t>MAY_WRITE
        return 0
    way_unpark(w, way)
    return sent


# The scratch buffer, with what dst did not take, becomes the way's; no byte is copied.
# The caller made sure that another buffer is free.
cdef void way_park(Worker* w, Way* way, size_t start, size_t stop) noexcept nogil:
    way.parked = w.scratch
    way.parked_from = start
    way.parked_to = stop
    way.buffer = w.scratch_index
    add_own64(&w.counters.parked_bytes, stop - start)
    add_own64(&w.counters.buffers_in_use, 1)
    w.scratch_index = buffer_take(w)
    w.scratch = buffer_at(w, w.scratch_index)


# Give the parked buffer back, with or without bytes left in it.
cdef void way_unpark(Worker* w, Way* way) noexcept nogil:
    take_own64(&w.counters.parked_bytes, way.parked_to - way.parked_from)
    if way.buffer >= 0:
        buffer_give(w, way.buffer)
        take_own64(&w.counters.buffers_in_use, 1)
    else:
        head_give(way.parked)
        take_own64(&w.counters.heads_open, 1)
    way.parked = NULL
    way.buffer = -1


# Bytes the kernel of dst has taken. (UDP relays count datagrams, see tally_carried().)
cdef inline void way_account(Worker* w, Flow* flow, int index, size_t size) noexcept nogil:
    if flow_is_udp(flow):
        return
    flow.active_ms = w.now_ms
    add_own64(&flow.ways[index].delivered, size)
    if index == 0:
        add_own64(&w.counters.bytes_up, size)
    else:
        add_own64(&w.counters.bytes_down, size)


# Let go of whatever a direction still holds: parked bytes, a pipe.
cdef void way_clear(Worker* w, Way* way) noexcept nogil:
    if way.parked != NULL:
        way_unpark(w, way)
    if way.head != NULL:
        tls_drop_head(w, way)
    if way.pipe_read >= 0:
        take_own64(&w.counters.parked_bytes, way.pipe_bytes)
        pipe_give(w, way)
