# The life of a flow on its worker: admission, turns, and the one way out.
#
# Ownership: both fds belong to the flow from relay() on; flow_bury() is the only place that
# closes them. Order of closing (pitfalls: fd reuse): state DEAD, off every list, EPOLL DEL,
# close, and only then the slot may travel back to the control plane.


# -> 1 a flow of datagrams: a gate, a peer, or a relay.
cdef inline bint flow_is_udp(Flow* flow) noexcept nogil:
    return flow.kind >= KIND_GATE


# -> 1 a relay of datagrams: it has a link.
cdef inline bint flow_is_udp_relay(Flow* flow) noexcept nogil:
    return flow.kind == KIND_BOUND or flow.kind == KIND_DIALLED


# Move a flow along the diagram in _fastcopy.pxd.
cdef inline void flow_move(Worker* w, Flow* flow, uint32_t state) noexcept nogil:
    NP_BUG(load_relaxed32(&flow.state) != state - 1, &w.counters.bugs,
           b"flow took an illegal step")
    publish_release32(&flow.state, state)


# What its epoll events carry, but for the side.
cdef inline uint64_t flow_tag(Flow* flow, uint32_t slot) noexcept nogil:
    return (<uint64_t>load_relaxed32(&flow.generation) << 32) | (slot << 1)


# Register both sockets. No extra look at them is needed: adding a socket that is readable
# or writable already queues an event (man epoll(7)), so early data, an early FIN and an
# early RST all come with the next epoll_wait. Runs on: the worker.
cdef void flow_admit(Worker* w, Flow* flow, uint32_t slot) noexcept nogil:
    cdef uint64_t tag = flow_tag(flow, slot)
    cdef int side
    cdef int rc
    flow_move(w, flow, FLOW_OPEN)
    list_append(w.core.flows, &w.all, LINK_ALL, slot)
    if flow.kind == KIND_HANDSHAKE:
        rc = sys_epoll_add(w.epoll, flow.legs[0].fd, tag)
        if rc < 0:
            flow_bury(w, flow, slot, R_RESET, 1, -rc)
        return
    add_own64(&w.counters.fds_open, (flow.legs[0].fd >= 0) + (flow.legs[1].fd >= 0))
    flow.active_ms = w.now_ms
    if flow.idle_ms:
        wheel_put(w, flow, slot)
    for side in range(2):
        if flow.ways[side].parked != NULL or flow.ways[side].head != NULL:
            add_own64(&w.counters.heads_open, 1)
            add_own64(&w.counters.parked_bytes,
                      flow.ways[side].parked_to + flow.ways[side].head_to)
    if flow_is_udp(flow):
        udp_admit(w, flow, slot)
        return
    for side in range(2):
        # From here on only flow_bury() closes politely: if the process is killed in mid
        # transfer, the kernel resets both sides, and nobody takes a cut stream for whole.
        rc = sys_arm_reset(flow.legs[side].fd, 1)
        NP_BUG(rc == -ENOTSOCK, &w.counters.bugs, b"not a socket after all")
        if side and flow.is_dialling:
            # Before it is added: a socket that nobody has dialled yet counts as hung up.
            rc = 0
            if flow.goal.sin6_family:           # else it has been begun
                rc = sys_connect(flow.legs[side].fd, &flow.goal)
            if rc < 0:
                flow_bury(w, flow, slot, R_UNMET, 2, -rc)
                return
        rc = sys_epoll_add(w.epoll, flow.legs[side].fd, tag | <uint64_t>side)
        if rc < 0:
            flow_bury(w, flow, slot, R_RESET, side + 1, -rc)
            return


# -> 1 if the flow wants another turn in this round's successor, 0 otherwise.
# Runs on: the worker.
cdef int flow_turn(Worker* w, Flow* flow, uint32_t slot) noexcept nogil:
    # A leg with an error is read before it is written to: the write would take the error.
    cdef int first = 1 if flow.legs[1].bits & SEEN_ERROR else 0
    cdef int more
    cdef int also
    if flow_is_udp(flow):
        return udp_turn(w, flow, slot)
    if flow.kind == KIND_HANDSHAKE:
        return handshake_turn(w, flow, slot)
    if flow.is_dialling and not tcp_dial_turn(w, flow, slot):
        return 0
    more = way_pump(w, flow, slot, first)
    if more < 0:
        return 0
    also = way_pump(w, flow, slot, 1 - first)
    if also < 0:
        return 0
    if flow_check_error(w, flow, slot, first, more):
        return 0
    if flow_check_error(w, flow, slot, 1 - first, also):
        return 0
    if flow.ways[0].state == WAY_SHUT and flow.ways[1].state == WAY_SHUT:
        flow_bury(w, flow, slot, R_FINISHED, 0, 0)
        return 0
    return more | also


# -> 1 if the flow is buried. A socket with an error first gives what it has received, then
# the error, so a direction that reads meets it by itself. One that is stopped by
# back-pressure or has seen EOF would never look: then the error ends the flow here. After our
# close_notify the leg's own end is all that is left to come, and that cannot be faked.
cdef inline int flow_check_error(
    Worker* w, Flow* flow, uint32_t slot, int index, int has_more
) noexcept nogil:
    cdef Leg* leg = &flow.legs[index]
    cdef int code
    if has_more or not leg.bits & SEEN_ERROR or leg.bits & TLS_NOTIFIED:
        return 0
    leg.bits &= ~<uint32_t>SEEN_ERROR
    code = sys_socket_error(leg.fd)
    if code == 0:
        return 0
    flow_bury(w, flow, slot, R_RESET, index + 1, code)
    return 1


# The end of a flow, whatever the reason. R_FINISHED closes politely: both FINs are sent and
# received, nothing is unread. Every other end is a reset on both sides, so that nobody
# takes a cut stream for a whole one; datagrams know no such thing, so UDP relays that nobody
# uses any more are polite, too. Runs on: the worker.
cdef void flow_bury(
    Worker* w, Flow* flow, uint32_t slot, int reason, int side, int code
) noexcept nogil:
    cdef Flow* flows = w.core.flows
    cdef bint is_polite = reason == R_FINISHED or (reason == R_IDLE and flow_is_udp(flow))
    cdef int i
    flow_move(w, flow, FLOW_DEAD)
    flow.reason = <uint8_t>reason
    flow.side = <uint8_t>side
    flow.code = code
    list_remove(flows, &w.all, LINK_ALL, slot)
    if flow.is_ready:
        flow.is_ready = 0
        list_remove(flows, &w.ready, LINK_READY, slot)
    if flow.idle_ms:
        wheel_drop(w, flow, slot)
    if flow_is_udp(flow):
        udp_bury(w, flow, slot, reason)
    for i in range(2):
        way_clear(w, &flow.ways[i])
        if flow.kind != KIND_HANDSHAKE and flow.legs[i].fd >= 0:
            leg_close(w, &flow.legs[i], not is_polite)
    if flow.kind == KIND_HANDSHAKE:
        leg_return(w, &flow.legs[0])
        if reason == R_RESET:
            add_own64(&w.counters.handshakes_failed, 1)
    list_append(flows, &w.grave, LINK_READY, slot)


cdef inline void flow_want_turn(Worker* w, Flow* flow, uint32_t slot) noexcept nogil:
    if not flow.is_ready:
        flow.is_ready = 1
        list_append(w.core.flows, &w.ready, LINK_READY, slot)


cdef inline uint64_t flow_token(Flow* flow, uint32_t slot) noexcept nogil:
    return (<uint64_t>load_relaxed32(&flow.generation) << 32) | slot


# A send to leg `index` failed: the leg is dead, but what it said before may still wait in
# its socket (a server that answers 413 and closes while the upload goes on). Deliver that,
# then apply the reset law. -> always -1.
cdef ssize_t flow_break(
    Worker* w, Flow* flow, uint32_t slot, int index, int code
) noexcept nogil:
    cdef int rc = 1
    if not flow.is_breaking and not flow_is_udp(flow):
        flow.is_breaking = 1
        flow.legs[index].bits |= MAY_READ
        while rc == 1:          # bounded: nothing is added to a dead socket
            rc = way_pump(w, flow, slot, index)
        if rc < 0:
            return -1
    return flow_reset(w, flow, slot, index, code)


# The reset law; `index` is the leg at fault. -> always -1.
cdef inline ssize_t flow_reset(
    Worker* w, Flow* flow, uint32_t slot, int index, int code
) noexcept nogil:
    flow_bury(w, flow, slot, R_RESET, index + 1, code)
    return -1
