# TLS legs: the same laws as in way.pxi, with OpenSSL between the socket and the bytes.
#
# One buffer, worked on in place. A read lands at the back of the worker's scratch buffer, is
# opened towards the middle and sealed towards the front; what comes out is always shorter or
# lags so far behind that it never overtakes what is still to be read:
#
#     0            TLS_PLAIN_AT          TLS_CIPHER_AT                       BUFFER_BYTES
#     | sealed ... <------ plaintext ... <------ ciphertext as received ... |
#
# One recv, then OpenSSL record by record, then one send: never a system call per record.
#
# OpenSSL reads from a BIO that is laid over the ciphertext, and has taken all of it by the
# time it asks for more; so nothing is hidden in it between turns, except what its Connection
# held when it came (TLS_HOLDS) and an unfinished record. What it writes goes through a
# memory BIO that is emptied after every call (TLS_OWES: not yet looked at). Hence the order
# on the wire: parked bytes, then what OpenSSL said by itself, then new records.
#
# The end of a TLS leg is its close_notify. A FIN without one is a cut stream: reset law.
# At the end of its source a TLS leg gets our close_notify, then SHUT_WR; both once.
#
# The error queue is the thread's: it is emptied before each call that may fill it.
# Step functions return as in way.pxi. Runs on: workers.

cdef OpenSsl openssl            # [c] fills it once, before the first Connection gets here

cdef enum:
    RECORD_BYTES = 16384        # the most plaintext one record holds (RFC 8446, section 5.1)
    # Plaintext lags by 32 KiB: an unfinished record from the read before may add 16.3 KiB to
    # it. Sealing adds 22 bytes per 16 KiB, 1 KiB in all; its lag is as large as the other.
    TLS_PLAIN_AT = 32768
    TLS_CIPHER_AT = 65536
    # One recv: what is left of the buffer. Two relays in a row, bulk, CPU seconds per GB of
    # both: 64 KiB 1.03, 128 KiB 1.11, 256 KiB 1.07, 448 KiB 0.98. docs/engine.md.
    TLS_READ_BYTES = 458752
    # Budget of one direction in one turn. Sealing 448 KiB takes 0.25 ms, as long as copying the
    # 1 MiB of TURN_BYTES: so a turn is one large read, or a few small ones.
    TLS_TURN_BYTES = 262144
    # The smallest recv: while every buffer is out, and of a TLS leg in the beginning. Reads that
    # are filled double it; one that was more wrapping than plaintext sets it back and ends
    # the turn, because 448 KiB of one-byte records take 5 ms, of key updates 0.2 s.
    TLS_STEP_BYTES = 16384
    TLS_STEPS = 5               # doublings, to TLS_READ_BYTES
    # So much in a row without any plaintext ends the flow: 2 400 key updates. An honest peer has
    # an unfinished record of 16.3 KiB and a few messages.
    TLS_FRUITLESS_BYTES = 65536
    # Room behind a piece for what OpenSSL says by itself while the peer reads nothing: 150
    # answers to key updates.
    PIECE_SPARE = 4096


# -> 1 more to do but out of budget, 0 wait for an event, -1 the flow is buried.
cdef int tls_pump(Worker* w, Flow* flow, uint32_t slot, int index) noexcept nogil:
    cdef Way* way = &flow.ways[index]
    cdef Leg* src = &flow.legs[index]
    cdef Leg* dst = &flow.legs[1 - index]
    cdef ssize_t budget = TLS_TURN_BYTES
    cdef ssize_t rc = 0
    cdef bint was_stalled = src.bits & TLS_STALLED
    while way.state == WAY_OPEN and dst.bits & MAY_WRITE:
        if way.parked != NULL:
            rc = tls_send_parked(w, flow, slot, index)
        elif dst.bits & TLS_OWES:
            rc = tls_answer(w, flow, slot, 1 - index)
        elif way.head == NULL and src.bits & HAS_ENDED:
            rc = tls_end(w, flow, slot, index)
        elif way.head == NULL and not src.bits & (MAY_READ | TLS_HOLDS):
            break
        elif dst.bits & TLS_STALLED:
            break
        elif budget <= 0:
            return 1
        elif way.head != NULL:
            rc = tls_seal_head(w, flow, slot, index)
        else:
            rc = tls_move(w, flow, slot, index)
        if rc < 0:
            return -1
        if rc == 0:
            break
        budget -= rc
    if way.record and way.parked == NULL and way.head == NULL and not dst.bits & TLS_OWES:
        tls_slim(way, dst)
    return was_stalled and not src.bits & TLS_STALLED   # the other way may write again


# Bulk is over, for the moment at least. OpenSSL never shrinks a memory BIO: a new one, at a
# microsecond per turn, saves the 20 KiB that a record has made it grow to.
cdef void tls_slim(Way* way, Leg* dst) noexcept nogil:
    cdef void* bio = openssl.bio_new(openssl.bio_memory())
    way.record = 0
    if bio != NULL:
        openssl.set_bio(dst.tls, dst.tls_in, bio)       # frees the one before
        dst.tls_out = bio


# One read, opened and sealed as the legs want it, one send.
cdef ssize_t tls_move(Worker* w, Flow* flow, uint32_t slot, int index) noexcept nogil:
    cdef Way* way = &flow.ways[index]
    cdef Leg* src = &flow.legs[index]
    cdef size_t room = tls_read_room(w, way, src)
    cdef char* plain = w.scratch + TLS_PLAIN_AT
    cdef char* cipher = w.scratch + TLS_CIPHER_AT
    cdef ssize_t got = 0
    cdef ssize_t rc
    cdef Batch batch
    if not src.bits & TLS_HOLDS:
        got = sys_recv(src.fd, plain if src.tls == NULL else cipher, room, 0)
        if got == 0:
            return tls_read_end(w, flow, slot, index)
        if got == -EAGAIN:
            src.bits &= ~<uint32_t>MAY_READ
            return 0
        if got < 0:
            return flow_reset(w, flow, slot, index, <int>-got)
        if <size_t>got == room and way.streak < TLS_STEPS:
            way.streak += 1
        if <size_t>got < room and not src.bits & (SEEN_RDHUP | SEEN_URGENT):
            src.bits &= ~<uint32_t>MAY_READ     # "drained": see way_copy()
        room = BUFFER_BYTES - TLS_PLAIN_AT
    if src.tls == NULL:
        rc = tls_pass(w, flow, slot, index, plain, got)
        return got if rc > 0 else rc
    tls_open(src, cipher, got, plain, room, &batch)
    NP_BUG(batch.size == BUFFER_BYTES - TLS_PLAIN_AT, &w.counters.bugs, b"a read overran")
    rc = tls_pass(w, flow, slot, index, plain, batch.size)
    if rc < 0:
        return -1
    if batch.code:
        tls_alert(w, flow, index)
        flow.detail = batch.detail
        return flow_reset(w, flow, slot, index, batch.code)
    if tls_answer(w, flow, slot, index) < 0:
        return -1
    way.fruitless = 0 if batch.size else way.fruitless + <uint32_t>got
    if way.fruitless > TLS_FRUITLESS_BYTES:
        return flow_reset(w, flow, slot, index, ENOBUFS)
    if 2 * batch.size < <size_t>got:
        way.streak = 0
        got = TLS_TURN_BYTES
    return got + 1 if rc else 0


cdef inline size_t tls_read_room(Worker* w, Way* way, Leg* src) noexcept nogil:
    if w.free_buffers == 0:
        return TLS_STEP_BYTES
    if src.tls == NULL:
        return TLS_READ_BYTES
    return min(<size_t>TLS_STEP_BYTES << way.streak, <size_t>TLS_READ_BYTES)


# The socket has no more: the end of a plain leg, the cutting of a TLS one. (With its
# close_notify read nobody looks at the socket any more.)
cdef ssize_t tls_read_end(Worker* w, Flow* flow, uint32_t slot, int index) noexcept nogil:
    cdef Leg* src = &flow.legs[index]
    src.bits &= ~<uint32_t>MAY_READ
    if flow.is_breaking:
        return 0                # its error has been taken; what looks like EOF is no FIN
    if src.tls != NULL:
        return flow_reset(w, flow, slot, index, ENODATA)
    src.bits |= HAS_ENDED
    return 1


# Lay `size` bytes of ciphertext before OpenSSL and open all that is complete. Whatever comes
# out in *result.size is genuine, also with a code.
cdef void tls_open(
    Leg* leg, const char* cipher, size_t size, char* into, size_t room, Batch* result
) noexcept nogil:
    cdef void* bio
    cdef int got
    cdef int why
    memset(result, 0, sizeof(Batch))
    leg.bits &= ~<uint32_t>TLS_STALLED
    if size:
        bio = openssl.bio_over(cipher, <int>size)
        if bio == NULL:
            result.code = ENOMEM
            return
        openssl.bio_at_end(bio, -1)             # "ask again", not "the end"
        openssl.set_bio(leg.tls, bio, leg.tls_out)      # frees the one before
        leg.tls_in = bio
    while result.size < room:
        openssl.errors_clear()
        got = openssl.read(leg.tls, into + result.size, <int>(room - result.size))
        if got > 0:
            result.size += got
            continue
        leg.bits &= ~<uint32_t>TLS_HOLDS
        why = openssl.result(leg.tls, got)
        if why == SSL_PEER_ENDED:
            leg.bits |= HAS_ENDED
            leg.bits &= ~<uint32_t>MAY_READ
        elif why != SSL_WANTS_READ:
            result.code = EBADMSG
            result.detail = openssl.errors_peek()
        return


# Pass plaintext in scratch on. What cannot be sealed yet (TLS_STALLED) is kept as a head.
cdef ssize_t tls_pass(
    Worker* w, Flow* flow, uint32_t slot, int index, const char* plain, size_t size
) noexcept nogil:
    cdef Way* way = &flow.ways[index]
    cdef size_t start = plain - w.scratch
    cdef size_t sealed = size
    cdef ssize_t rc
    if size == 0:
        return 1
    if flow.legs[1 - index].tls == NULL:
        return tls_ship(w, flow, slot, index, start, start + size, size)
    rc = tls_seal(w, flow, slot, index, plain, &sealed)
    if rc < 0 or sealed == size:
        return rc
    # If scratch has been parked meanwhile, its bytes are still where they were.
    way.head = head_take(plain + sealed, size - sealed, 0)
    if way.head == NULL:
        return flow_reset(w, flow, slot, 1 - index, ENOMEM)
    way.head_from = 0
    way.head_to = size - sealed
    add_own64(&w.counters.heads_open, 1)
    add_own64(&w.counters.parked_bytes, way.head_to)
    return rc


# Seal plaintext, which stands in scratch or is a head, and send the records. *size becomes
# what was sealed: all, or less while OpenSSL has read one half of a message of the peer's;
# until the other half is here it writes nothing (TLS_STALLED).
cdef ssize_t tls_seal(
    Worker* w, Flow* flow, uint32_t slot, int index, const char* plain, size_t* size
) noexcept nogil:
    cdef Way* way = &flow.ways[index]
    cdef Leg* dst = &flow.legs[1 - index]
    cdef char* into = w.scratch
    cdef const char* wall = w.scratch + BUFFER_BYTES
    cdef bint is_inside = <const char*>into <= plain and plain < wall
    cdef size_t left = size[0]
    cdef int done
    cdef int got
    while left:
        openssl.errors_clear()
        done = openssl.write(dst.tls, plain, <int>min(left, <size_t>RECORD_BYTES))
        if done <= 0:
            if openssl.result(dst.tls, done) == SSL_WANTS_READ:
                dst.bits |= TLS_STALLED
                break
            flow.detail = openssl.errors_peek()
            return flow_reset(w, flow, slot, 1 - index, EBADMSG)
        plain += done
        left -= done
        if is_inside:
            wall = plain        # do not write over what is still to be sealed
        got = openssl.bio_read(dst.tls_out, into, <int>(wall - into))
        if got == wall - into:
            dst.bits |= TLS_OWES
        if got > 0:
            into += got
        if done == RECORD_BYTES:
            way.record = got
    size[0] -= left
    if into == w.scratch:
        return 1
    return tls_ship(w, flow, slot, index, 0, into - w.scratch, size[0])


# Seal the next part of a head.
cdef ssize_t tls_seal_head(Worker* w, Flow* flow, uint32_t slot, int index) noexcept nogil:
    cdef Way* way = &flow.ways[index]
    cdef size_t size = way.head_to - way.head_from
    cdef ssize_t rc
    size = min(size, <size_t>(TLS_READ_BYTES if w.free_buffers else TLS_STEP_BYTES))
    rc = tls_seal(w, flow, slot, index, way.head + way.head_from, &size)
    if rc < 0:
        return -1
    way.head_from += size
    take_own64(&w.counters.parked_bytes, size)
    if way.head_from == way.head_to:
        tls_drop_head(w, way)
    return <ssize_t>size if rc else 0


cdef void tls_drop_head(Worker* w, Way* way) noexcept nogil:
    take_own64(&w.counters.parked_bytes, way.head_to - way.head_from)
    take_own64(&w.counters.heads_open, 1)
    head_give(way.head)
    way.head = NULL


# Send scratch[start:stop]; what dst does not take is parked. `owed` is the plaintext that
# counts as delivered once its records are out. -> 1 all is out, 0 parked, -1 buried.
cdef ssize_t tls_ship(
    Worker* w, Flow* flow, uint32_t slot, int index, size_t start, size_t stop, size_t owed
) noexcept nogil:
    cdef Way* way = &flow.ways[index]
    cdef Leg* dst = &flow.legs[1 - index]
    cdef ssize_t sent = 0
    way.owed = owed
    way.paid = 0
    way.shipped = 0
    if dst.bits & MAY_WRITE:
        sent = sys_send(dst.fd, w.scratch + start, stop - start)
        if sent < 0:
            if sent != -EAGAIN:
                return tls_send_failed(w, flow, slot, index, <int>-sent)
            sent = 0
    start += sent
    tls_account(w, flow, index, sent, start == stop)
    if start == stop:
        return 1
    dst.bits &= ~<uint32_t>MAY_WRITE
    if w.free_buffers:
        way_park(w, way, start, stop)
        way.parked_room = BUFFER_BYTES
    elif tls_park_piece(w, way, w.scratch + start, stop - start) < 0:
        return flow_reset(w, flow, slot, 1 - index, ENOMEM)
    return 0


# -> 0 or -ENOMEM. With every buffer out, bytes are parked in a piece of memory of their own: a
# record cannot be left in the socket as plain bytes can. At most 36 KiB, and rare.
cdef int tls_park_piece(Worker* w, Way* way, const char* data, size_t size) noexcept nogil:
    cdef char* piece = head_take(data, size, PIECE_SPARE)
    if piece == NULL:
        return -ENOMEM
    way.parked = piece
    way.parked_from = 0
    way.parked_to = size
    way.parked_room = size + PIECE_SPARE
    way.buffer = -1
    add_own64(&w.counters.heads_open, 1)
    add_own64(&w.counters.parked_bytes, size)
    return 0


cdef ssize_t tls_send_parked(Worker* w, Flow* flow, uint32_t slot, int index) noexcept nogil:
    cdef Way* way = &flow.ways[index]
    cdef Leg* dst = &flow.legs[1 - index]
    cdef size_t size = way.parked_to - way.parked_from
    cdef ssize_t sent
    if dst.tls == NULL:
        return way_send_parked(w, flow, slot, index)
    sent = sys_send(dst.fd, way.parked + way.parked_from, size)
    if sent < 0:
        if sent != -EAGAIN:
            return tls_send_failed(w, flow, slot, index, <int>-sent)
        sent = 0
    tls_account(w, flow, index, sent, <size_t>sent == size)
    way.parked_from += sent
    take_own64(&w.counters.parked_bytes, sent)
    if <size_t>sent < size:
        dst.bits &= ~<uint32_t>MAY_WRITE
        return 0
    way_unpark(w, way)
    return sent


# A failed send ends the flow, unless all it had to carry was our close_notify: who has closed
# answers that with RST, and this direction is over all the same.
cdef ssize_t tls_send_failed(
    Worker* w, Flow* flow, uint32_t slot, int index, int code
) noexcept nogil:
    cdef Way* way = &flow.ways[index]
    if not flow.legs[1 - index].bits & TLS_NOTIFIED:
        return flow_break(w, flow, slot, 1 - index, code)
    if way.parked != NULL:
        way_unpark(w, way)
    way.state = WAY_SHUT
    return 1


# Count what is delivered: every byte of a plain leg, whole records of a TLS one.
cdef void tls_account(
    Worker* w, Flow* flow, int index, size_t sent, bint is_all
) noexcept nogil:
    cdef Way* way = &flow.ways[index]
    cdef size_t due
    if flow_is_udp(flow):
        return
    if sent:
        flow.active_ms = w.now_ms
    if flow.legs[1 - index].tls == NULL:
        way_account(w, flow, index, sent)
        return
    way.shipped += sent
    due = way.owed
    if not is_all:
        due = min(due, way.shipped // way.record * RECORD_BYTES if way.record else 0)
    if due > way.paid:
        way_account(w, flow, index, due - way.paid)
        way.paid = due


# Send what OpenSSL says to leg `index` by itself: answers to key updates, tickets. It goes
# behind what is parked for that leg. -> 1 taken care of, -1 buried. Uses scratch.
cdef ssize_t tls_answer(Worker* w, Flow* flow, uint32_t slot, int index) noexcept nogil:
    cdef Leg* leg = &flow.legs[index]
    cdef Way* way = &flow.ways[1 - index]
    cdef int got
    leg.bits &= ~<uint32_t>TLS_OWES
    got = openssl.bio_read(leg.tls_out, w.scratch, BUFFER_BYTES)
    if got <= 0 or leg.bits & TLS_NOTIFIED:
        return 1
    if way.parked == NULL:
        return -1 if tls_ship(w, flow, slot, 1 - index, 0, got, 0) < 0 else 1
    # Nobody honest asks for so many answers and reads none.
    if <size_t>got > way.parked_room - way.parked_to:
        return flow_reset(w, flow, slot, index, ENOBUFS)
    memcpy(way.parked + way.parked_to, w.scratch, got)
    way.parked_to += got
    add_own64(&w.counters.parked_bytes, got)
    return 1


# Our last word on a leg whose TLS is broken, if what is parked before it can still go out.
cdef void tls_alert(Worker* w, Flow* flow, int index) noexcept nogil:
    cdef Leg* leg = &flow.legs[index]
    cdef Way* way = &flow.ways[1 - index]
    cdef size_t size
    cdef int got
    if leg.bits & TLS_NOTIFIED:
        return
    if way.parked != NULL:
        size = way.parked_to - way.parked_from
        if sys_send(leg.fd, way.parked + way.parked_from, size) != <ssize_t>size:
            return
    got = openssl.bio_read(leg.tls_out, w.scratch, BUFFER_BYTES)
    if got > 0 and sys_send(leg.fd, w.scratch, got) < 0:
        return                  # it was worth a try


# EOF of src, with everything delivered: pass it on, once.
cdef ssize_t tls_end(Worker* w, Flow* flow, uint32_t slot, int index) noexcept nogil:
    cdef Leg* dst = &flow.legs[1 - index]
    cdef int got
    if flow.is_breaking or dst.tls == NULL or dst.bits & TLS_NOTIFIED:
        return way_end(w, flow, slot, index)
    dst.bits |= TLS_NOTIFIED
    openssl.errors_clear()
    if openssl.shutdown(dst.tls) < 0:
        flow.detail = openssl.errors_peek()
        return flow_reset(w, flow, slot, 1 - index, EBADMSG)
    got = openssl.bio_read(dst.tls_out, w.scratch, BUFFER_BYTES)
    return tls_ship(w, flow, slot, index, 0, max(got, 0), 0)
