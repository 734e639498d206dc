# UDP relays, the side of the UDP socket: frames in scratch leave as datagrams.


# Lay out one sending call from the frames at `at`. -> messages, 0: no whole frame is there.
cdef uint32_t udp_send_pack(Worker* w, Flow* flow, Udp* udp, char* at, char* end) noexcept nogil:
    cdef Mail* mail = w.mail
    cdef Gate* gate = w.core.udps[udp.gate].own if flow.kind == KIND_BOUND else NULL
    cdef uint32_t count = 0
    cdef uint32_t pieces = 0
    cdef uint32_t segment = 0
    cdef size_t run = 0
    cdef size_t size
    cdef bint is_run
    while end - at >= FRAME_HEAD:
        size = (<size_t><uint8_t>at[0] << 8) + <uint8_t>at[1]
        if <size_t>(end - at) < FRAME_HEAD + size:
            break
        # A run of equal datagrams, of which the last may be shorter, is one message with GSO.
        is_run = udp.gso and run and 0 < size <= segment and run + size <= GSO_BYTES and (
            mail.frames[count - 1] < GSO_SEGMENTS
        )
        if pieces == MAIL_PIECES or (count == MAIL_BATCH and not is_run):
            break
        if not is_run:
            if count:
                mmsg_seal(w, count - 1, udp, gate, segment)
            mmsg_begin(w, count, &mail.pieces[pieces], gate)
            count += 1
            segment = <uint32_t>size
            run = 0
        mail.pieces[pieces].iov_base = at + FRAME_HEAD
        mail.pieces[pieces].iov_len = size
        pieces += 1
        mail.outgoing[count - 1].msg_hdr.msg_iovlen += 1
        mail.frames[count - 1] += 1
        run = run + size if size == segment and size else 0
        at += FRAME_HEAD + size
    if count:
        mmsg_seal(w, count - 1, udp, gate, segment)
    if count and gate != NULL:
        mmsg_address(w, udp, gate)
    return count


# Send the messages that are laid out. *at moves behind the frames that are sent or lost; where
# the socket is full the relay is blocked. -> 0, -1 buried.
cdef int udp_send(
    Worker* w, Flow* flow, uint32_t slot, uint32_t count, char** at
) noexcept nogil:
    cdef Udp* udp = &w.core.udps[slot]
    cdef int fd = flow.legs[1].fd
    cdef uint32_t done = 0
    cdef uint32_t i
    cdef uint64_t frames
    cdef size_t size
    cdef int n
    if flow.kind == KIND_BOUND:
        fd = w.core.flows[udp.gate].legs[0].fd
    while done < count:
        n = sys_sendmmsg(fd, &w.mail.outgoing[done], count - done)
        if n == -EAGAIN:
            udp_send_block(w, flow, slot)
            return 0
        if n == -ECONNREFUSED:
            if udp_send_refused(w, flow, slot) < 0:
                return -1
            continue            # the error was an earlier datagram's: this one is still here
        if n < 0 and flow.kind == KIND_DIALLED and not udp.is_retried:
            udp.is_retried = 1
            continue            # the same may be true of any error: once more tells
        if n < 0:
            n = udp_send_forgive(w, udp, done, -n)
            if n == 0:
                return 0        # lay out again, without what the kernel cannot do
            at[0] += mmsg_bytes(w, done) + FRAME_HEAD * w.mail.frames[done]
            done += 1
            continue
        udp.is_retried = 0
        udp.local_worked = udp.has_local
        frames = 0
        size = 0
        for i in range(done, done + <uint32_t>n):
            frames += w.mail.frames[i]
            size += mmsg_bytes(w, i)
        flow.active_ms = w.now_ms
        tally_carried(w, udp, udp_link(flow), frames, size)
        at[0] += size + FRAME_HEAD * frames
        done += <uint32_t>n
    return 0


# The kernel would not send message `i`. -> 1 its datagrams are lost and counted, 0 it was GSO,
# or an address that nothing can leave from (a broadcast): that is switched off for this relay, and
# nothing is lost. Where the address that the visitor wrote to is ours no more, they are lost: from
# another one he would take them for somebody else's, and it may come back.
cdef int udp_send_forgive(Worker* w, Udp* udp, uint32_t i, int code) noexcept nogil:
    if w.mail.frames[i] > 1 and (code == EIO or code == EINVAL or code == EMSGSIZE):
        udp.gso = 0             # some drivers cannot, some paths are narrower
        return 0
    if udp.has_local and not udp.local_worked and (
        code == EINVAL or code == EADDRNOTAVAIL or code == ENODEV
    ):
        udp.has_local = 0
        return 0
    tally_drop(w, udp, T_UNSENT, w.mail.frames[i])
    return 1


cdef void udp_send_block(Worker* w, Flow* flow, uint32_t slot) noexcept nogil:
    cdef Udp* udp = &w.core.udps[slot]
    if flow.kind == KIND_BOUND:
        gate_block(w, udp, slot)
        return
    udp.is_blocked = 1
    flow.legs[1].bits &= ~<uint32_t>MAY_WRITE
    udp_watch(w, flow, slot, 1, 1)


# Nobody listens at the target, says ICMP. -> 0 perhaps somebody will, -1 it is over.
cdef int udp_send_refused(Worker* w, Flow* flow, uint32_t slot) noexcept nogil:
    cdef Udp* udp = &w.core.udps[slot]
    add_own64(&udp.tally[T_REFUSED], 1)
    if udp.refused_ms == 0:
        udp.refused_ms = w.now_ms
    elif w.now_ms - udp.refused_ms >= UDP_REFUSED_MS:
        flow_bury(w, flow, slot, R_RESET, 2, ECONNREFUSED)
        return -1
    return 0
