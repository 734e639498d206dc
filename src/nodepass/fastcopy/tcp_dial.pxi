# Relays whose second side is yet to be connected.
#
# Its worker dials, because the answer comes to that epoll set anyway: between the answer and the
# first byte no other thread is woken. Until then nothing is read from the first side; what comes
# early waits in the kernel.


# -> 1 the second side is connected, and the turn goes on; 0 there is no answer yet, or the flow is
# buried. Runs on: the worker.
cdef int tcp_dial_turn(Worker* w, Flow* flow, uint32_t slot) noexcept nogil:
    cdef Leg* leg = &flow.legs[1]
    cdef int code
    if not leg.bits & MAY_WRITE:
        if flow.legs[0].bits & SEEN_ERROR:
            flow.legs[0].bits &= ~<uint32_t>SEEN_ERROR
            code = sys_socket_error(flow.legs[0].fd)
            if code:
                flow_bury(w, flow, slot, R_UNMET, 1, code)      # nobody is left to dial for
        return 0
    if flow.idle_ms:
        wheel_drop(w, flow, slot)
        flow.idle_ms = 0
    flow.is_dialling = 0
    code = sys_socket_error(leg.fd)
    if code == ECONNRESET or code == EPIPE:
        # It was connected, and reset by the time we look: that is a relay that has been reset,
        # and what the target said before is passed on. The error itself is taken now.
        flow_break(w, flow, slot, 1, code)
        return 0
    if code == 0 and sys_is_mirror(leg.fd, &flow.goal):
        # Nobody listens on a port of this machine from the ephemeral range, and the kernel has
        # picked that very port for us.
        code = ECONNREFUSED
    if code:
        flow_bury(w, flow, slot, R_UNMET, 2, code)
        return 0
    if flow.later_idle_ms:
        flow.idle_ms = flow.later_idle_ms
        flow.active_ms = w.now_ms
        wheel_put(w, flow, slot)
    return 1
