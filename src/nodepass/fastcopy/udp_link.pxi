# UDP relays, the side of the link: frames out, frames in.
#
# Datagrams are gathered into scratch as frames, sealed if the link speaks TLS, and sent at once;
# what comes back is opened in scratch behind the half frame of the read before.


# Pass the datagrams chained to a relay on: to the link, or into the queue. -> 0, -1 buried.
cdef int udp_link_post(Worker* w, Flow* flow, uint32_t slot) noexcept nogil:
    cdef Udp* udp = &w.core.udps[slot]
    cdef Mail* mail = w.mail
    cdef int link = udp_link(flow)
    cdef Way* way = &flow.ways[1 - link]
    cdef Leg* leg = &flow.legs[link]
    cdef uint32_t i = udp.batch_first
    cdef const char* data
    cdef size_t left
    cdef size_t size
    cdef size_t filled = 0
    cdef uint64_t count = 0
    cdef bint is_done
    while i != NONE_SLOT:
        data = <const char*>mail.rooms[i].iov_base
        left = mail.incoming[i].msg_len
        is_done = False
        while not is_done:
            size = min(left, <size_t>mail.segments[i]) if mail.segments[i] else left
            if filled and filled + FRAME_HEAD + size > udp_link_room(w):
                if udp_link_pass(w, flow, slot, filled, count) < 0:
                    tally_drop(w, udp, T_SLOW_LINK, udp_link_chain_rest(w, i, left))
                    return -1
                filled = 0
                count = 0
            if udp.queue.bytes == 0 and udp_can_pass(flow, way, leg):
                udp_link_frame(w.scratch + UDP_PLAIN_AT + filled, data, size)
                filled += FRAME_HEAD + size
                count += 1
            elif not udp_link_wait(w, flow, udp, data, size):
                tally_drop(w, udp, T_SLOW_LINK, 1)
            data += size
            left -= size
            is_done = left == 0
        i = mail.next[i]
    return udp_link_pass(w, flow, slot, filled, count) if filled else 0


# -> datagrams of a chain from the last `left` bytes of datagram `i` on.
cdef uint64_t udp_link_chain_rest(Worker* w, uint32_t i, size_t left) noexcept nogil:
    cdef uint32_t segment = w.mail.segments[i]
    cdef uint64_t count = (left + segment - 1) // segment if segment else 1
    i = w.mail.next[i]
    while i != NONE_SLOT:
        count += mmsg_count(w, i)
        i = w.mail.next[i]
    return count


# Let a datagram wait for the link. A target is not read while any wait, so a batch is their bound;
# a gate is read whatever its links do. -> 1, 0 it is lost.
cdef inline int udp_link_wait(
    Worker* w, Flow* flow, Udp* udp, const char* data, size_t size
) noexcept nogil:
    if flow.kind == KIND_BOUND and udp.queue.bytes + FRAME_HEAD + size > UDP_QUEUE_BYTES:
        return 0
    return queue_put_frame(w, &udp.queue, data, size, QUEUE_KEEPS)


cdef inline size_t udp_link_room(Worker* w) noexcept nogil:
    return UDP_GATHER_BYTES if w.free_buffers else UDP_DRY_BYTES


cdef inline void udp_link_frame(char* into, const char* data, size_t size) noexcept nogil:
    into[0] = <char>(size >> 8)
    into[1] = <char>(size & 0xFF)
    memcpy(into + FRAME_HEAD, data, size)


# Send `size` bytes of gathered frames, `count` of them. -> 0, -1 buried.
cdef int udp_link_pass(
    Worker* w, Flow* flow, uint32_t slot, size_t size, uint64_t count
) noexcept nogil:
    cdef Udp* udp = &w.core.udps[slot]
    cdef int index = 1 - udp_link(flow)
    if tls_pass(w, flow, slot, index, w.scratch + UDP_PLAIN_AT, size) < 0:
        tally_drop(w, udp, T_SLOW_LINK, count)
        return -1
    tally_carried(w, udp, index, count, size - count * FRAME_HEAD)
    return 0


# Send what waits for the link, oldest first. -> 0, -1 buried.
cdef int udp_link_write(Worker* w, Flow* flow, uint32_t slot) noexcept nogil:
    cdef Udp* udp = &w.core.udps[slot]
    cdef int link = udp_link(flow)
    cdef int index = 1 - link
    cdef Way* way = &flow.ways[index]
    cdef Leg* leg = &flow.legs[link]
    cdef ssize_t rc = 1
    while rc > 0 and leg.bits & MAY_WRITE:
        if way.parked != NULL:
            rc = tls_send_parked(w, flow, slot, index)
        elif leg.bits & TLS_OWES:
            rc = tls_answer(w, flow, slot, link)
        elif leg.bits & TLS_STALLED:
            break
        elif way.head != NULL:
            rc = tls_seal_head(w, flow, slot, index)
        elif udp.queue.bytes:
            rc = udp_link_pass_queue(w, flow, slot)
        else:
            break
    return 0 if rc >= 0 else -1


# Gather frames of the queue and pass them. -> 1, -1 buried.
cdef int udp_link_pass_queue(Worker* w, Flow* flow, uint32_t slot) noexcept nogil:
    cdef Udp* udp = &w.core.udps[slot]
    cdef size_t filled = 0
    cdef size_t size
    cdef uint64_t count = 0
    if udp.is_raw:
        return udp_raw_launch(w, flow, slot)
    while udp.queue.bytes:
        size = queue_frame(w, &udp.queue)
        if filled and filled + size > udp_link_room(w):
            break
        queue_take(w, &udp.queue, w.scratch + UDP_PLAIN_AT + filled, size)
        filled += size
        count += 1
    return 1 if udp_link_pass(w, flow, slot, filled, count) == 0 else -1


# Take datagrams of the target while the link has room for them. -> 1 more, 0 wait, -1 buried.
cdef int udp_link_read_target(Worker* w, Flow* flow, uint32_t slot) noexcept nogil:
    cdef Udp* udp = &w.core.udps[slot]
    cdef Leg* leg = &flow.legs[1]
    cdef int batch
    cdef int n
    if udp.is_raw and not udp.is_shot:
        return 0                # nothing has been asked yet
    for batch in range(UDP_TURN_BATCHES):
        if not leg.bits & MAY_READ or udp.queue.bytes or udp.is_answered:
            return 0
        if not udp_can_pass(flow, &flow.ways[1], &flow.legs[0]):
            return 0
        n = mmsg_receive_past_errors(w, leg.fd)
        if n == -ECONNREFUSED:
            if udp_send_refused(w, flow, slot) < 0:
                return -1
            continue
        if n <= 0:
            leg.bits &= ~<uint32_t>MAY_READ
            return 0
        udp.refused_ms = 0
        udp_link_chain(w, udp, <uint32_t>n)
        if udp.batch_first != NONE_SLOT and udp.is_raw:
            return udp_raw_reply(w, flow, slot)
        if udp.batch_first != NONE_SLOT:
            flow.active_ms = w.now_ms
            if udp_link_post(w, flow, slot) < 0:
                return -1
        if n < MAIL_BATCH:
            leg.bits &= ~<uint32_t>MAY_READ     # drained: what comes later is a new edge
    return 1 if leg.bits & MAY_READ else 0


# Chain a whole batch to one relay.
cdef void udp_link_chain(Worker* w, Udp* udp, uint32_t count) noexcept nogil:
    cdef uint32_t lost = udp.socket_lost
    cdef uint32_t i
    udp.batch_first = NONE_SLOT
    for i in range(count):
        mmsg_open(w, i, &lost)
        if mmsg_is_large(w, i, udp.limit):
            tally_drop(w, udp, T_TOO_LARGE, mmsg_count(w, i))
            continue
        w.mail.next[i] = NONE_SLOT
        if udp.batch_first == NONE_SLOT:
            udp.batch_first = i
        else:
            w.mail.next[udp.batch_last] = i
        udp.batch_last = i
    tally_overrun(w, udp, lost)


# Read the link and deliver its datagrams. -> 1 more to do, 0 wait for an event, -1 buried.
cdef int udp_link_read(Worker* w, Flow* flow, uint32_t slot) noexcept nogil:
    cdef Udp* udp = &w.core.udps[slot]
    cdef int link = udp_link(flow)
    cdef Leg* leg = &flow.legs[link]
    cdef char* plain = w.scratch + UDP_PLAIN_AT
    cdef ssize_t budget = UDP_TURN_BYTES
    cdef size_t held
    cdef ssize_t got
    while budget > 0:
        if udp.is_blocked:
            return 0
        held = udp.rest.bytes
        if held and not udp.is_raw and queue_frame(w, &udp.rest) <= held and (
            held >= FRAME_HEAD
        ):
            queue_take(w, &udp.rest, w.scratch, held)
            got = udp_link_deliver(w, flow, slot, w.scratch, w.scratch + held, &budget)
        elif leg.bits & HAS_ENDED:
            return udp_end(w, flow, slot)
        elif not leg.bits & (MAY_READ | TLS_HOLDS):
            return 0
        else:
            plain = w.scratch + UDP_PLAIN_AT
            if not udp.is_raw:
                queue_take(w, &udp.rest, plain - held, held)
            else:
                held = 0
            got = udp_link_receive(w, flow, slot, plain - held, plain, &budget)
        if got < 0:
            return -1
        budget -= got + 1
    return 1


# One read of the link behind the half frame that begins at `begin`. -> bytes, -1 buried.
cdef ssize_t udp_link_receive(
    Worker* w, Flow* flow, uint32_t slot, char* begin, char* plain, ssize_t* budget
) noexcept nogil:
    cdef int link = udp_link(flow)
    cdef Leg* leg = &flow.legs[link]
    cdef Way* way = &flow.ways[link]
    cdef char* cipher = w.scratch + UDP_CIPHER_AT
    cdef size_t room = UDP_READ_BYTES
    cdef ssize_t got = 0
    cdef Batch batch
    memset(&batch, 0, sizeof(batch))
    if leg.tls != NULL:
        room = min(<size_t>TLS_STEP_BYTES << way.streak, <size_t>UDP_READ_BYTES)
    if not leg.bits & TLS_HOLDS:
        got = sys_recv(leg.fd, plain if leg.tls == NULL else cipher, room, 0)
        if got == 0:
            leg.bits |= HAS_ENDED
        if got <= 0 or (<size_t>got < room and not leg.bits & (SEEN_RDHUP | SEEN_URGENT)):
            leg.bits &= ~<uint32_t>MAY_READ
        if got == -EAGAIN:
            got = 0
        if got < 0:
            flow_reset(w, flow, slot, link, <int>-got)
            return -1
        if <size_t>got == room and way.streak < TLS_STEPS:
            way.streak += 1
    if leg.tls == NULL:
        batch.size = <size_t>got
    elif got or leg.bits & TLS_HOLDS:
        tls_open(leg, cipher, <size_t>got, plain, BUFFER_BYTES - UDP_PLAIN_AT, &batch)
    if udp_link_deliver(w, flow, slot, begin, plain + batch.size, budget) < 0:
        return -1
    if leg.tls == NULL:
        return got
    if udp_link_settle(w, flow, slot, <size_t>got, &batch) < 0:
        return -1
    # A read that was more wrapping than plaintext ends the turn: see TLS_STEP_BYTES.
    return UDP_TURN_BYTES if 2 * batch.size < <size_t>got else got


# What a read of a TLS link asks for besides its plaintext. -> 0, -1 buried.
cdef int udp_link_settle(
    Worker* w, Flow* flow, uint32_t slot, size_t got, Batch* batch
) noexcept nogil:
    cdef int link = udp_link(flow)
    cdef Way* way = &flow.ways[link]
    if batch.code:
        tls_alert(w, flow, link)
        flow.detail = batch.detail
        flow_reset(w, flow, slot, link, batch.code)
        return -1
    if tls_answer(w, flow, slot, link) < 0:
        return -1
    way.fruitless = 0 if batch.size else way.fruitless + <uint32_t>got
    if way.fruitless > TLS_FRUITLESS_BYTES:
        flow_reset(w, flow, slot, link, ENOBUFS)
        return -1
    if 2 * batch.size < got:
        way.streak = 0
    return 0


# Send the whole frames in [at, end) as datagrams, as far as the budget goes; what remains waits.
# -> bytes sent, -1 buried.
cdef ssize_t udp_link_deliver(
    Worker* w, Flow* flow, uint32_t slot, char* at, char* end, ssize_t* budget
) noexcept nogil:
    cdef Udp* udp = &w.core.udps[slot]
    cdef char* start = at
    cdef uint32_t count
    cdef size_t size
    if udp.is_raw:
        return udp_raw_collect(w, flow, slot, at, end - at)
    while not udp.is_blocked and budget[0] > 0:
        count = udp_send_pack(w, flow, udp, at, end)
        if count == 0:
            break
        budget[0] -= <ssize_t>count * UDP_TURN_DATAGRAM
        if udp_send(w, flow, slot, count, &at) < 0:
            return -1
    # Blocked and out of cells: whole frames are lost, the half one is not.
    while at < end and not queue_put(w, &udp.rest, at, end - at):
        size = FRAME_HEAD
        if end - at >= FRAME_HEAD:
            size += (<size_t><uint8_t>at[0] << 8) + <uint8_t>at[1]
        if <size_t>(end - at) < size:
            flow_reset(w, flow, slot, udp_link(flow), ENOBUFS)
            return -1
        tally_drop(w, udp, T_UNSENT, 1)
        at += size
    return at - start


cdef inline int udp_link(Flow* flow) noexcept nogil:
    return 0 if flow.kind == KIND_DIALLED else 1
