# UDP relays: datagrams of one source on one side, frames on a link on the other.
#
#   bound     leg 0: the gate's socket   leg 1: link          (the server's side)
#   dialled   leg 0: link                leg 1: a connected socket of its own   (the client's)
#
# Way 0 goes from the visitor towards the target on both. The link is written and read by the very
# functions of TCP flows (tls.pxi: tls_pass() and its kin take plain links, too), so its laws of
# order, parking and TLS are theirs. What differs: nothing waits for long here. What the link
# does not take waits in a bounded queue, and what finds that full is lost and counted.
#
# Scratch, while a link is read or frames are gathered:
#
#     0           UDP_PLAIN_AT - rest    UDP_PLAIN_AT           UDP_CIPHER_AT       BUFFER_BYTES
#     | sealed ...      the half frame | plaintext ...    <---- ciphertext ...                |
#
# udp_link.pxi has what goes over the link, udp_send.pxi what leaves by a UDP socket, udp_raw.pxi
# the seed dialect. Runs on: the worker.

cdef enum:
    UDP_PLAIN_AT = 98304        # room for the beginning of a frame, 65 537, and for sealing
    UDP_CIPHER_AT = 131072      # plaintext lags 32 KiB behind: see TLS_PLAIN_AT
    UDP_READ_BYTES = 262144     # one recv from a link: 1 200 datagrams of 200 bytes
    UDP_GATHER_BYTES = 131072   # frames that are gathered for one send
    UDP_DRY_BYTES = 16384       # the same while every buffer is out: what is left of it is copied
    UDP_QUEUE_BYTES = 131072    # frames that wait for a link; 10 ms at 100 Mbit/s
    UDP_TURN_BYTES = 262144     # budget of reading a link in one turn, ...
    UDP_TURN_DATAGRAM = 512     # ... of which each datagram takes so much more: 512 in 2 ms
    UDP_TURN_BATCHES = 4        # and of a target
    UDP_REFUSED_MS = 2000       # a target that refuses for so long is dialled afresh


# Wait for room in a UDP socket, or no longer.
cdef void udp_watch(
    Worker* w, Flow* flow, uint32_t slot, int side, bint wants_room
) noexcept nogil:
    cdef uint64_t tag = flow_tag(flow, slot) | <uint64_t>side
    cdef int rc = sys_epoll_watch(w.epoll, flow.legs[side].fd, tag, EPOLL_CTL_MOD, wants_room)
    NP_BUG(rc < 0, &w.counters.bugs, b"a UDP socket is not watched")


# -> 1 the flow is on its way, 0 it is buried. Gates and spares are no flows of bytes, but begin
# here as well.
cdef int udp_admit(Worker* w, Flow* flow, uint32_t slot) noexcept nogil:
    cdef Udp* udp = &w.core.udps[slot]
    cdef Gate* gate
    cdef int link = udp_link(flow)
    cdef int side = 0 if flow.kind == KIND_GATE else 1
    cdef int rc = 0
    udp.born_ms = w.now_ms
    if flow.kind == KIND_PEER:
        if not gate_is_open(w, udp):
            flow_bury(w, flow, slot, R_ABORTED, 0, 0)
            return 0
        gate = w.core.udps[udp.gate].own
        if NP_BUG(gate.spare_count >= MAX_WAITING, &w.counters.bugs, b"too many spares"):
            flow_bury(w, flow, slot, R_ABORTED, 0, 0)
            return 0
        gate.spares[gate.spare_count] = slot
        gate.spare_count += 1
        return 1
    if flow.kind == KIND_BOUND:
        if not gate_bind(w, flow, slot):
            flow_bury(w, flow, slot, R_ABORTED, 0, 0)
            return 0
    else:
        flow.legs[side].bits = MAY_WRITE
        rc = sys_epoll_watch(w.epoll, flow.legs[side].fd, flow_tag(flow, slot) | <uint64_t>side,
                             EPOLL_CTL_ADD, 0)
    if rc == 0 and flow.kind != KIND_GATE:
        # If the process is killed in mid relay the far side sees a reset.
        rc = sys_arm_reset(flow.legs[link].fd, 1)
        NP_BUG(rc == -ENOTSOCK, &w.counters.bugs, b"not a socket after all")
        rc = sys_epoll_add(w.epoll, flow.legs[link].fd, flow_tag(flow, slot) | <uint64_t>link)
    if rc < 0:
        flow_bury(w, flow, slot, R_RESET, 0, -rc)
        return 0
    udp_take_head(w, flow, slot)
    return 1


# What was read from the link before comes first.
cdef void udp_take_head(Worker* w, Flow* flow, uint32_t slot) noexcept nogil:
    cdef Way* way = &flow.ways[udp_link(flow)]
    cdef Udp* udp = &w.core.udps[slot]
    if way.head == NULL:
        return
    if udp.is_raw:
        if udp_raw_collect(w, flow, slot, way.head, way.head_to) < 0:
            return
    elif not queue_put(w, &udp.rest, way.head, way.head_to):
        flow_bury(w, flow, slot, R_RESET, 0, ENOBUFS)
        return
    tls_drop_head(w, way)
    flow_want_turn(w, flow, slot)


# One turn of any UDP flow. -> 1 it wants another one, 0 it waits for an event or is over.
cdef int udp_turn(Worker* w, Flow* flow, uint32_t slot) noexcept nogil:
    cdef Udp* udp = &w.core.udps[slot]
    cdef int link = udp_link(flow)
    cdef Way* way = &flow.ways[1 - link]
    cdef Leg* leg = &flow.legs[link]
    cdef int more = 0
    cdef int rc
    if flow.kind == KIND_GATE:
        return gate_turn(w, flow, slot)
    if flow.kind == KIND_DIALLED and udp.is_blocked and flow.legs[1].bits & MAY_WRITE:
        udp.is_blocked = 0
        udp_watch(w, flow, slot, 1, 0)
    rc = udp_link_read(w, flow, slot)
    if rc < 0:
        return 0
    more |= rc
    if udp_link_write(w, flow, slot) < 0:
        return 0
    if flow.kind == KIND_DIALLED:
        rc = udp_link_read_target(w, flow, slot)
        if rc < 0:
            return 0
        more |= rc
    if leg.tls != NULL and way.record and udp_has_sent(flow, way, leg):
        tls_slim(way, leg)
    if udp.is_answered:
        udp_raw_finish(w, flow, slot)
        return 0
    return more


# -> 1 nothing is in front of new frames but the queue.
cdef inline bint udp_has_sent(Flow* flow, Way* way, Leg* leg) noexcept nogil:
    return way.parked == NULL and way.head == NULL and not leg.bits & TLS_OWES


# -> 1 the link takes frames now.
cdef inline bint udp_can_pass(Flow* flow, Way* way, Leg* leg) noexcept nogil:
    return udp_has_sent(flow, way, leg) and (leg.bits & (MAY_WRITE | TLS_STALLED)) == MAY_WRITE


# The link has ended, and every whole frame before its end is delivered. -> 0, -1 buried.
cdef int udp_end(Worker* w, Flow* flow, uint32_t slot) noexcept nogil:
    cdef Udp* udp = &w.core.udps[slot]
    if udp.is_raw:
        return udp_raw_end(w, flow, slot)
    flow_bury(w, flow, slot, R_FINISHED, 0, 0)
    return -1


# A wish of the control plane. Runs in the inbox, so it may end other flows, but not this one.
cdef void udp_touch(Worker* w, Flow* flow, uint32_t slot) noexcept nogil:
    cdef Udp* udp = &w.core.udps[slot]
    cdef uint32_t wishes = exchange32(&udp.wishes, 0)
    if flow.kind == KIND_GATE:
        if wishes & WISH_SHUT:
            udp.own.is_shut = 1
        if wishes & WISH_RELIEVE:
            gate_relieve(w, udp.own)
        return
    if wishes & WISH_LIMIT and flow.kind != KIND_PEER:
        udp.raw_ms = load_relaxed32(&udp.wished_ms)
        if not udp_raw_is_collecting(flow, udp):
            udp_set_limit(w, flow, slot, udp.raw_ms)
    if wishes & WISH_TARGET:
        udp_retarget(w, flow, slot)


# Go on with another socket towards the target; what waits for room or for the link stays. An
# event of the old one that is still in this batch tells of nothing, which is no harm.
cdef void udp_retarget(Worker* w, Flow* flow, uint32_t slot) noexcept nogil:
    cdef Udp* udp = &w.core.udps[slot]
    cdef Leg* leg = &flow.legs[1]
    cdef int old = leg.fd
    cdef int fd = <int>exchange32(&udp.fresh, 0) - 1
    cdef int rc
    if fd < 0:
        return
    add_own64(&w.counters.fds_open, 1)
    if sys_epoll_watch(w.epoll, fd, flow_tag(flow, slot) | 1, EPOLL_CTL_ADD, 0) < 0:
        old = fd                # no room in the kernel: it stays as it was
    else:
        rc = sys_epoll_delete(w.epoll, old)
        NP_BUG(rc == -EBADF, &w.counters.bugs, b"a socket was closed by a stranger")
        leg.fd = fd
        leg.bits = MAY_READ | MAY_WRITE
        udp.is_blocked = 0
        udp.is_retried = 0
        udp.refused_ms = 0
        udp.socket_lost = 0
        flow_want_turn(w, flow, slot)
    fd_mark(w.core, old, 0)
    fd_close(w, old)


cdef void udp_set_limit(Worker* w, Flow* flow, uint32_t slot, uint32_t idle_ms) noexcept nogil:
    if flow.idle_ms:
        wheel_drop(w, flow, slot)
    flow.idle_ms = idle_ms
    if idle_ms:
        wheel_put(w, flow, slot)


# The idle limit is over.
cdef void udp_expire(Worker* w, Flow* flow, uint32_t slot) noexcept nogil:
    if w.core.udps[slot].is_raw:
        udp_raw_expire(w, flow, slot)
    else:
        flow_bury(w, flow, slot, R_IDLE, 0, 0)


# What a UDP flow holds besides its legs and ways, given back at its end.
cdef void udp_bury(Worker* w, Flow* flow, uint32_t slot, int reason) noexcept nogil:
    cdef Udp* udp = &w.core.udps[slot]
    if flow.kind == KIND_GATE:
        gate_close(w, slot)
        return
    if udp.is_blocked and flow.kind == KIND_BOUND:
        list_remove(w.core.flows, &w.core.udps[udp.gate].own.blocked, LINK_BLOCKED, slot)
    udp.is_blocked = 0
    if flow.kind == KIND_PEER or flow.kind == KIND_BOUND:
        gate_part(w, flow, slot, reason)
    tally_drop(w, udp, T_SLOW_LINK, queue_drop_frames(w, &udp.queue))
    if udp.is_raw:
        queue_drop(w, &udp.rest)
    else:
        tally_drop(w, udp, T_SLOW_LINK, queue_drop_frames(w, &udp.rest))
    if reason == R_FINISHED or reason == R_IDLE:
        udp_say_end(w, flow)


# A TLS link that is closed politely hears so, if nothing is in the way.
cdef void udp_say_end(Worker* w, Flow* flow) noexcept nogil:
    cdef int link = udp_link(flow)
    cdef Leg* leg = &flow.legs[link]
    cdef int got
    if leg.tls == NULL or leg.bits & TLS_NOTIFIED:
        return
    if not udp_has_sent(flow, &flow.ways[1 - link], leg):
        return
    leg.bits |= TLS_NOTIFIED
    openssl.errors_clear()
    openssl.shutdown(leg.tls)           # if it cannot, the end of the stream has to do
    got = openssl.bio_read(leg.tls_out, w.scratch, BUFFER_BYTES)
    if got > 0 and sys_send(leg.fd, w.scratch, got) < 0:
        return                          # it was worth a try
