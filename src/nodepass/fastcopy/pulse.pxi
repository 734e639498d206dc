# Whether the far ends of a flow's connections are still there.
#
# Keepalive ends a quiet connection, but not one with bytes in flight: those the kernel resends for
# a quarter of an hour. TCP_USER_TIMEOUT would end it, and a reader that merely pauses, too: Linux
# counts it while a window stays closed, although the far end answers every probe of it. So the
# worker asks the kernel now and then what has come back, of flows that have had a turn since the
# last look or that wait for an answer. Between looks nobody pays for it.
#
# A sign of life is an acknowledgement, new or not, or a byte; an answer to a probe is one, too. An
# end counts as gone when resends and probes have gone unanswered since the last one, for long:
#
#     as a rule        `deadlines` of silence, three parts of ten watched, and MISSES
#     an end in doubt  one part of ten since it was doubted, and DOUBT_MISSES
#
# The patience is 50 s where nobody says otherwise: keepalive gives a quiet connection 60 s, and
# with a look every 5 s this is no more. A doubt takes 5 s, above the round trip of a full mobile
# link.

cdef enum:
    LOOKS = 10                  # parts of the patience: between two looks, and a doubt
    DOUBT_LOOKS = 50            # between two looks while an end is in doubt
    LOOKS_WATCHED = 3           # one that was idle for long before has its chance, too
    LOOKS_A_ROUND = 64          # 64 us at most, so that looks delay no byte
    MISSES = 3                  # as many as keepalive has
    DOUBT_MISSES = 2            # one may be lost on a good path
    JITTER_MS = 60              # two coarse clocks, up to 10 ms each, and a look's own time
    # The kernel doubles the pause between resends and probes up to 120 s; so long it would take to
    # hear of the death of a reader that has paused for an hour. Linux 6.15; before, that is so.
    HURRIED_MS = 5000
    HURRY_BACKOFF = 3           # doublings: by then a look or two have passed
    # What an end in doubt is asked with, and what net.tune() has given it before; seconds.
    PROBE_IDLE = 1
    PROBE_INTERVAL = 2
    KEEPALIVE_IDLE = 30
    KEEPALIVE_INTERVAL = 10


# Look at flows, a few in each round: the front of the list of all goes to its back.
cdef void pulse_run(Worker* w) noexcept nogil:
    cdef uint32_t left
    cdef uint32_t slot
    cdef Flow* flow
    if w.looks_left == 0:
        if w.look_ms == 0 or w.now_ms < w.look_ms:
            return
        w.looks_left = w.all.count
        w.look_ms = 0           # unless one of them wants another look
    left = min(w.looks_left, LOOKS_A_ROUND)
    w.looks_left -= left
    while left and w.all.count:
        left -= 1
        slot = w.all.first
        flow = &w.core.flows[slot]
        list_remove(w.core.flows, &w.all, LINK_ALL, slot)
        list_append(w.core.flows, &w.all, LINK_ALL, slot)
        if not flow.is_calm:
            pulse_look(w, flow, slot)
    if w.all.count == 0:
        w.looks_left = 0


# See that a look comes. Called behind turns, so a quiet worker still sleeps.
cdef inline void pulse_want(Worker* w) noexcept nogil:
    if w.look_ms == 0:
        w.look_ms = w.now_ms + w.core.patience_ms // (DOUBT_LOOKS if w.doubted else LOOKS)


# -> 1 a leg is a stream with a far end that can be asked.
cdef inline bint pulse_has(Flow* flow, int side) noexcept nogil:
    if flow.kind == KIND_HANDSHAKE or flow.legs[side].fd < 0:
        return 0
    if flow_is_udp(flow):
        return flow_is_udp_relay(flow) and side == udp_link(flow)
    return not (side and flow.is_dialling)


# One look at a flow; it may be buried afterwards.
cdef void pulse_look(Worker* w, Flow* flow, uint32_t slot) noexcept nogil:
    cdef bint is_calm = 1
    cdef int side
    cdef int rc
    for side in range(2):
        if not pulse_has(flow, side):
            continue
        rc = pulse_look_at(w, &flow.legs[side])
        if rc < 0:
            flow_bury(w, flow, slot, R_RESET, side + 1, ETIMEDOUT)
            return
        if rc:
            is_calm = 0
    flow.is_calm = is_calm
    if not is_calm:
        pulse_want(w)


# -> 0 nothing waits for an answer, 1 something does, -1 its far end is gone.
cdef int pulse_look_at(Worker* w, Leg* leg) noexcept nogil:
    cdef tcp_info info
    cdef int waiting = sys_unanswered(leg.fd)
    cdef uint64_t heard
    cdef uint32_t missed
    cdef uint64_t part = w.core.patience_ms // LOOKS
    cdef int rc
    if waiting <= 0 and leg.doubted_ms == 0:
        leg.heard_ms = 0
        return 0
    if sys_tcp_info(leg.fd, &info) < 0:
        pulse_trust(w, leg)       # no TCP: its end cannot go without a word
        return 0
    heard = min(info.tcpi_last_ack_recv, info.tcpi_last_data_recv)
    heard = w.now_ms - heard if heard < w.now_ms else 1
    missed = <uint32_t>info.tcpi_retransmits + info.tcpi_probes
    if leg.heard_ms == 0 or heard > leg.heard_ms + JITTER_MS:
        leg.heard_ms = heard
        leg.since_ms = w.now_ms
        leg.missed = missed     # a live peer with its window closed has some, too
    if leg.doubted_ms and heard > leg.doubted_ms + JITTER_MS:
        pulse_trust(w, leg)
    if missed < leg.missed:
        leg.missed = missed
    if waiting > 0 and not leg.is_hurried and (missed or info.tcpi_backoff >= HURRY_BACKOFF):
        leg.is_hurried = 1
        rc = sys_set(leg.fd, IPPROTO_TCP, TCP_RTO_MAX_MS, HURRIED_MS)
        NP_BUG(rc == -ENOTSOCK, &w.counters.bugs, b"resends of no socket")
    missed -= leg.missed
    if leg.doubted_ms and (waiting > 0 or leg.is_probed) and missed >= DOUBT_MISSES and (
        w.now_ms - leg.doubted_ms >= part
    ):
        return -1
    if waiting > 0 and missed >= MISSES and w.now_ms - heard >= w.core.patience_ms and (
        w.now_ms - leg.since_ms >= LOOKS_WATCHED * part
    ):
        return -1
    return 1


# What [c] has heard makes it doubt that an end is there. Runs in the inbox; may bury the flow.
cdef void pulse_doubt(Worker* w, Flow* flow, uint32_t slot) noexcept nogil:
    cdef uint32_t doubts = exchange32(&flow.doubts, 0)
    cdef uint64_t look_ms = w.now_ms + w.core.patience_ms // DOUBT_LOOKS
    cdef Leg* leg
    cdef int side
    for side in range(2):
        leg = &flow.legs[side]
        if not doubts & (1 << side) or not pulse_has(flow, side):
            continue
        if leg.doubted_ms == 0:
            leg.doubted_ms = w.now_ms
            w.doubted += 1
        if doubts & DOUBT_QUIET and not leg.is_probed:
            leg.is_probed = 1
            pulse_keep_alive(w, leg, PROBE_IDLE, PROBE_INTERVAL)
    if w.look_ms == 0 or w.look_ms > look_ms:
        w.look_ms = look_ms
    pulse_look(w, flow, slot)


# Its end has given a sign of life, or the flow is over.
cdef void pulse_trust(Worker* w, Leg* leg) noexcept nogil:
    if leg.doubted_ms:
        leg.doubted_ms = 0
        w.doubted -= 1
    if leg.is_probed:
        leg.is_probed = 0
        pulse_keep_alive(w, leg, KEEPALIVE_IDLE, KEEPALIVE_INTERVAL)


# What a kernel does not take it does without.
cdef void pulse_keep_alive(Worker* w, Leg* leg, int idle, int interval) noexcept nogil:
    cdef int rc = sys_set(leg.fd, SOL_SOCKET, SO_KEEPALIVE, 1)
    if rc == 0:
        rc = sys_set(leg.fd, IPPROTO_TCP, TCP_KEEPINTVL, interval)
    if rc == 0:
        rc = sys_set(leg.fd, IPPROTO_TCP, TCP_KEEPIDLE, idle)
    NP_BUG(rc == -ENOTSOCK, &w.counters.bugs, b"keepalive of no socket")
