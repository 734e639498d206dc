# UDP relays of the seed dialect: one datagram, one answer, each the bare bytes of a stream.
#
#   bound     the oldest parked datagram goes out; all that comes back up to the end is the answer
#   dialled   what comes in is the datagram; the first answer goes back, and that is the end
#
# Nothing on the wire says where the datagram ends. A small one comes in one piece on any path; a
# large one is taken for whole when nothing has followed for a moment. (The Go program takes what
# its first read returns, and cuts.) Runs on: the worker.

cdef enum:
    RAW_WHOLE_BYTES = 1000      # less comes in one segment: every path carries 1 280 bytes of IPv6
    RAW_QUIET_MS = 100          # one step of the wheel; pieces of one write follow at once
    RAW_MAX_BYTES = 65507       # the longest datagram of IPv4


# Bound: the one datagram, without its frame, to the link. -> 1, -1 buried.
cdef int udp_raw_launch(Worker* w, Flow* flow, uint32_t slot) noexcept nogil:
    cdef Udp* udp = &w.core.udps[slot]
    cdef size_t size = udp.queue.bytes - FRAME_HEAD
    queue_take(w, &udp.queue, NULL, FRAME_HEAD)
    queue_take(w, &udp.queue, w.scratch + UDP_PLAIN_AT, size)
    udp.is_shot = 1
    return 1 if udp_raw_pass(w, flow, slot, size) == 0 else -1


# -> 0, -1 buried.
cdef int udp_raw_pass(Worker* w, Flow* flow, uint32_t slot, size_t size) noexcept nogil:
    cdef Udp* udp = &w.core.udps[slot]
    cdef int index = 1 - udp_link(flow)
    if tls_pass(w, flow, slot, index, w.scratch + UDP_PLAIN_AT, size) < 0:
        tally_drop(w, udp, T_SLOW_LINK, 1)
        return -1
    tally_carried(w, udp, index, 1, size)
    return 0


# Bytes of the link: a part of the datagram or of the answer. -> size, -1 buried.
cdef ssize_t udp_raw_collect(
    Worker* w, Flow* flow, uint32_t slot, const char* data, size_t size
) noexcept nogil:
    cdef Udp* udp = &w.core.udps[slot]
    if flow.kind == KIND_DIALLED and udp.is_shot:
        return <ssize_t>size    # one datagram was all there could be
    if size == 0:
        return 0
    if udp.rest.bytes + size > RAW_MAX_BYTES or not queue_put(w, &udp.rest, data, size):
        tally_drop(w, udp, T_TOO_LARGE, 1)
        flow_bury(w, flow, slot, R_FINISHED, 0, 0)
        return -1
    flow.active_ms = w.now_ms
    if flow.kind == KIND_BOUND:
        return <ssize_t>size
    if udp.rest.bytes >= RAW_WHOLE_BYTES:
        udp_set_limit(w, flow, slot, RAW_QUIET_MS)
    elif udp_raw_shoot(w, flow, slot) < 0:
        return -1
    return <ssize_t>size


# -> 1 the idle limit is in use: it waits for another piece of the datagram.
cdef inline bint udp_raw_is_collecting(Flow* flow, Udp* udp) noexcept nogil:
    return udp.is_raw and flow.kind == KIND_DIALLED and udp.rest.bytes and not udp.is_shot


# Dialled: the datagram is whole, send it to the target. -> 0, -1 buried.
cdef int udp_raw_shoot(Worker* w, Flow* flow, uint32_t slot) noexcept nogil:
    cdef Udp* udp = &w.core.udps[slot]
    udp.is_shot = 1
    if udp_raw_send(w, flow, slot) < 0:
        return -1
    flow.active_ms = w.now_ms
    udp_set_limit(w, flow, slot, udp.raw_ms)
    flow_want_turn(w, flow, slot)       # an answer that was too early has not been read
    return 0


# What has been collected leaves as one datagram. -> 0, -1 buried.
cdef int udp_raw_send(Worker* w, Flow* flow, uint32_t slot) noexcept nogil:
    cdef Udp* udp = &w.core.udps[slot]
    cdef Gate* gate = w.core.udps[udp.gate].own if flow.kind == KIND_BOUND else NULL
    cdef size_t size = udp.rest.bytes
    cdef char* data = w.scratch
    cdef char* at = data
    queue_take(w, &udp.rest, data, size)
    while at == data and not udp.is_blocked:
        mmsg_begin(w, 0, &w.mail.pieces[0], gate)
        w.mail.pieces[0].iov_base = data
        w.mail.pieces[0].iov_len = size
        w.mail.outgoing[0].msg_hdr.msg_iovlen = 1
        w.mail.frames[0] = 1
        mmsg_seal(w, 0, udp, gate, 0)
        if gate != NULL:
            mmsg_address(w, udp, gate)
        if udp_send(w, flow, slot, 1, &at) < 0:
            return -1
    if at == data:
        tally_drop(w, udp, T_UNSENT, 1)
    return 0


# Bound: the answer has ended, by the link or by the clock.
cdef void udp_raw_answer(Worker* w, Flow* flow, uint32_t slot) noexcept nogil:
    if w.core.udps[slot].rest.bytes and udp_raw_send(w, flow, slot) < 0:
        return
    flow_bury(w, flow, slot, R_FINISHED, 0, 0)


# Dialled: the first datagram of the target is chained; it is the answer. -> 1, -1 buried.
cdef int udp_raw_reply(Worker* w, Flow* flow, uint32_t slot) noexcept nogil:
    cdef Udp* udp = &w.core.udps[slot]
    cdef uint32_t i = udp.batch_first
    cdef size_t size = w.mail.segments[i] if w.mail.segments[i] else w.mail.incoming[i].msg_len
    memcpy(w.scratch + UDP_PLAIN_AT, w.mail.rooms[i].iov_base, size)
    udp.is_answered = 1
    return 1 if udp_raw_pass(w, flow, slot, size) == 0 else -1


# Dialled: close the link behind the answer, once that is out.
cdef void udp_raw_finish(Worker* w, Flow* flow, uint32_t slot) noexcept nogil:
    if udp_has_sent(flow, &flow.ways[1], &flow.legs[0]):
        flow_bury(w, flow, slot, R_FINISHED, 0, 0)


# The link has ended. -> 0 the target may still answer, -1 buried.
cdef int udp_raw_end(Worker* w, Flow* flow, uint32_t slot) noexcept nogil:
    cdef Udp* udp = &w.core.udps[slot]
    if flow.kind == KIND_BOUND:
        udp_raw_answer(w, flow, slot)
        return -1
    if udp.is_shot:
        return 0
    if udp.rest.bytes:
        return udp_raw_shoot(w, flow, slot)
    flow_bury(w, flow, slot, R_FINISHED, 0, 0)
    return -1


# The time is over: for the answer, or for another piece of the datagram.
cdef void udp_raw_expire(Worker* w, Flow* flow, uint32_t slot) noexcept nogil:
    cdef Udp* udp = &w.core.udps[slot]
    if udp.rest.bytes and flow.kind == KIND_BOUND:
        udp_raw_answer(w, flow, slot)
    elif udp.rest.bytes and not udp.is_shot:
        udp_raw_shoot(w, flow, slot)
    else:
        flow_bury(w, flow, slot, R_IDLE, 0, 0)
