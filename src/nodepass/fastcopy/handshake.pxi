# TLS handshakes: one leg, lent by the control plane with its Connection and given back.
#
# They run on a worker of their own, because one costs as much time as moving a megabyte. It
# looks for orders after every few turns, so that an abort is quick in a crowd, too.
# Nothing is closed here. Runs on: that worker.

cdef enum:
    HANDSHAKE_STEPS = 8         # of one handshake in a turn; an honest one needs 3
    HANDSHAKE_TURNS = 8         # in a round: at 1 ms each an abort waits at most so long


# One turn of a handshake. -> 1 it wants another turn, 0 it waits or is over.
cdef int handshake_turn(Worker* w, Flow* flow, uint32_t slot) noexcept nogil:
    cdef Leg* leg = &flow.legs[0]
    cdef int step
    cdef int rc
    cdef int why
    cdef ssize_t got
    for step in range(HANDSHAKE_STEPS):
        if not flow.is_shaken:
            openssl.errors_clear()
            rc = openssl.handshake(leg.tls)
            flow.is_shaken = rc == 1
            why = SSL_WANTS_READ if rc == 1 else openssl.result(leg.tls, rc)
            if why != SSL_WANTS_READ:
                flow.detail = openssl.errors_peek()
                handshake_flush(w, flow)             # our alert, as far as it goes
                flow_bury(w, flow, slot, R_RESET, 1,
                          ENODATA if why == SSL_PEER_ENDED else EBADMSG)
                return 0
        rc = handshake_flush(w, flow)
        if rc < 0:
            flow_bury(w, flow, slot, R_RESET, 1, -rc)
            return 0
        if rc == 0:
            return 0
        if flow.is_shaken:
            flow_bury(w, flow, slot, R_FINISHED, 0, 0)
            return 0
        if not leg.bits & MAY_READ:
            return 0
        got = sys_recv(leg.fd, w.scratch, RECORD_BYTES, 0)
        if got == -EAGAIN:
            leg.bits &= ~<uint32_t>MAY_READ
            return 0
        if got <= 0:
            flow_bury(w, flow, slot, R_RESET, 1, <int>-got if got else ENODATA)
            return 0
        if got < RECORD_BYTES and not leg.bits & (SEEN_RDHUP | SEEN_URGENT):
            leg.bits &= ~<uint32_t>MAY_READ
        if openssl.bio_write(leg.tls_in, w.scratch, <int>got) != got:
            flow_bury(w, flow, slot, R_RESET, 1, ENOMEM)
            return 0
    return 1


# -> 1 all that OpenSSL has to say is out, 0 the socket is full, -errno otherwise.
cdef int handshake_flush(Worker* w, Flow* flow) noexcept nogil:
    cdef Leg* leg = &flow.legs[0]
    cdef Way* way = &flow.ways[1]
    cdef ssize_t sent
    cdef int got
    if way.parked != NULL:
        sent = sys_send(leg.fd, way.parked + way.parked_from, way.parked_to - way.parked_from)
        if sent < 0:
            return <int>sent if sent != -EAGAIN else 0
        way.parked_from += sent
        take_own64(&w.counters.parked_bytes, sent)
        if way.parked_from < way.parked_to:
            return 0
        way_unpark(w, way)
    got = openssl.bio_read(leg.tls_out, w.scratch, BUFFER_BYTES)
    if got <= 0:
        return 1
    sent = sys_send(leg.fd, w.scratch, got)
    if sent < 0 and sent != -EAGAIN:
        return <int>sent
    sent = max(sent, 0)
    if sent == got:
        return 1
    return tls_park_piece(w, way, w.scratch + sent, got - sent)


# The server's choice among the protocols that a client offers, called by OpenSSL in mid
# handshake: ours, or none. The type is SSL_CTX_alpn_select_cb_func.
cdef int handshake_select_alpn(
    void* ssl, const uint8_t** chosen, uint8_t* chosen_size, const uint8_t* offered,
    unsigned int size, void* argument
) noexcept nogil:
    cdef unsigned int at = 0
    while at < size and at + 1 + offered[at] <= size:
        if offered[at] == 10 and memcmp(&offered[at + 1], b"nodepass/2", 10) == 0:
            chosen[0] = &offered[at + 1]
            chosen_size[0] = 10
            return SSL_ALPN_CHOSEN
        at += 1 + offered[at]
    return SSL_ALPN_ALERT
