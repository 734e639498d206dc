# A gate: one bound UDP socket and every source that has written to it.
#
#   source unknown -> a spare becomes its peer, one Newcomer goes up, datagrams are parked
#        udp_bind() -> a bound relay takes the peer's place and its parked datagrams
#         its end  -> unknown again; or known for a moment longer, to be ignored (cooling)
#
# Peers need flow slots, and slots are the control plane's: it lends the gate as many as may wait
# (Gate.spares) and sends another when one comes back. So a flood of sources costs what `waiting`
# allows, and the datagrams of the rest are dropped and counted.
#
# A gate, its peers and its relays live on one worker. The table is keyed by source, and, where
# the socket is bound to every address, also by the address that was written to: the answer must
# come from there. Runs on: the worker.

cdef enum:
    GATE_BUCKETS = 65536        # of the table: 256 KiB; chains stay short up to 100 000 sources
    GATE_TURN_DATAGRAMS = 256   # take about as long as copying 1 MiB
    CROWD_SHARE = 4             # an address may have so many times the places that are left
    PARK_BYTES = 65536          # frames that a peer may have waiting; then the oldest goes
    COOL_MS = 1000              # a source whose relay failed does not get the next one sooner
    RELIEF_LOOKS = 64           # relays that one udp_relieve() looks at
    RELIEF_ANSWERED_MS = 1000   # silence after an answer: a look-up that is over
    RELIEF_UNANSWERED_MS = 5000     # as long as resolvers wait (UDP_READ_TIMEOUT)
    RELIEF_GROWN_MS = 30000     # keepalives come every 25 s or more often (WireGuard, SIP)
    RELIEF_YOUNG_MS = 2000      # longer exchanges are streams, as for the kernel's conntrack


cdef inline uint32_t gate_bucket(Gate* gate, const Key* key) noexcept nogil:
    cdef const uint64_t* words = <const uint64_t*>key
    cdef uint64_t hash = gate.seed
    cdef size_t i
    for i in range(sizeof(Key) // sizeof(uint64_t)):
        hash = (hash ^ words[i]) * <uint64_t>0x9E3779B97F4A7C15
        hash ^= hash >> 32
    return <uint32_t>(hash & (GATE_BUCKETS - 1))


# -> the count of an address, whatever the port; of IPv6 of its first 64 bits, as one has them all.
cdef inline uint16_t* gate_crowd(Gate* gate, const Key* key) noexcept nogil:
    cdef uint64_t words[2]
    cdef uint64_t hash
    memcpy(words, &key.source[0], sizeof(words))
    hash = (gate.seed ^ (words[0] if words[0] else words[1])) * <uint64_t>0x9E3779B97F4A7C15
    return &gate.crowds[hash >> 52]


# -> the slot that a source has, NONE_SLOT if none.
cdef uint32_t gate_find(Worker* w, Gate* gate, const Key* key) noexcept nogil:
    cdef uint32_t next = gate.buckets[gate_bucket(gate, key)]
    while next:
        if memcmp(&w.core.udps[next - 1].key, key, sizeof(Key)) == 0:
            return next - 1
        next = w.core.udps[next - 1].next
    return NONE_SLOT


cdef void gate_list(Worker* w, Gate* gate, uint32_t slot) noexcept nogil:
    cdef Udp* udp = &w.core.udps[slot]
    cdef uint32_t* bucket = &gate.buckets[gate_bucket(gate, &udp.key)]
    udp.next = bucket[0]
    bucket[0] = slot + 1
    udp.is_listed = 1


cdef void gate_unlist(Worker* w, Gate* gate, uint32_t slot) noexcept nogil:
    cdef Udp* udp = &w.core.udps[slot]
    cdef uint32_t* place = &gate.buckets[gate_bucket(gate, &udp.key)]
    while place[0] != slot + 1:
        if NP_BUG(place[0] == 0, &w.counters.bugs, b"a source is not in its table"):
            return
        place = &w.core.udps[place[0] - 1].next
    place[0] = udp.next
    udp.is_listed = 0


# -> 1 the gate that a spare or a fresh relay names is still the one it was made for.
cdef inline bint gate_is_open(Worker* w, Udp* udp) noexcept nogil:
    cdef Flow* flow = &w.core.flows[udp.gate]
    cdef uint32_t state = load_acquire32(&flow.state)
    return state == FLOW_OPEN and load_relaxed32(&flow.generation) == udp.gate_generation


# One turn: take what has come, in batches, and give each relay its share of a batch at once.
# -> 1 there may be more, 0 wait for an event.
cdef int gate_turn(Worker* w, Flow* flow, uint32_t slot) noexcept nogil:
    cdef Leg* leg = &flow.legs[0]
    cdef Gate* gate = w.core.udps[slot].own
    cdef int64_t budget = GATE_TURN_DATAGRAMS
    cdef int n
    if gate.blocked.count and leg.bits & MAY_WRITE:
        gate_unblock(w, flow, slot)
    while budget > 0 and leg.bits & MAY_READ:
        n = mmsg_receive_past_errors(w, leg.fd)
        if n < MAIL_BATCH:
            leg.bits &= ~<uint32_t>MAY_READ     # drained: what comes later is a new edge
        if n <= 0:
            break
        budget -= <int64_t>gate_sort(w, slot, <uint32_t>n)
        gate_hand_out(w)
    return 1 if leg.bits & MAY_READ else 0


# Chain the datagrams of a batch to the peers and relays that they are for, in order. -> how many
# they are.
cdef uint64_t gate_sort(Worker* w, uint32_t slot, uint32_t count) noexcept nogil:
    cdef Mail* mail = w.mail
    cdef Udp* own = &w.core.udps[slot]
    cdef Udp* udp
    cdef uint32_t lost = own.socket_lost
    cdef uint32_t last = NONE_SLOT
    cdef uint32_t found
    cdef uint32_t i
    cdef uint64_t total = 0
    mail.touched_count = 0
    for i in range(count):
        mmsg_source(w, i)
        mmsg_open(w, i, &lost)
        total += mmsg_count(w, i)
        if mmsg_is_large(w, i, own.limit):
            tally_drop(w, own, T_TOO_LARGE, mmsg_count(w, i))
            continue
        if not own.own.is_wildcard:
            memset(&mail.keys[i].local[0], 0, 16)
        if last != NONE_SLOT and memcmp(&w.core.udps[last].key, &mail.keys[i], sizeof(Key)) == 0:
            found = last
        else:
            found = gate_find(w, own.own, &mail.keys[i])
            if found == NONE_SLOT:
                found = gate_welcome(w, slot, &mail.keys[i])
        if found == NONE_SLOT:
            tally_drop(w, own, T_NO_LINK, mmsg_count(w, i))
            continue
        last = found
        udp = &w.core.udps[found]
        mail.next[i] = NONE_SLOT
        if udp.batch_first == NONE_SLOT:
            udp.batch_first = i
            mail.touched[mail.touched_count] = found
            mail.touched_count += 1
        else:
            mail.next[udp.batch_last] = i
        udp.batch_last = i
    tally_overrun(w, own, lost)
    return total


# Make a spare the peer of an unknown source. -> its slot, NONE_SLOT: there is no room.
cdef uint32_t gate_welcome(Worker* w, uint32_t slot, const Key* key) noexcept nogil:
    cdef Gate* gate = w.core.udps[slot].own
    cdef uint32_t found
    if gate.is_shut or gate.spare_count == 0 or cell_left(w) <= PARK_KEEPS + MAIL_CELLS:
        return NONE_SLOT
    # The scarcer the places, the fewer for one address: alone it gets four fifths, beside another
    # four ninths, and to take them all needs as many addresses as a quarter of the places.
    if gate_crowd(gate, key)[0] >= CROWD_SHARE * gate.spare_count:
        return NONE_SLOT
    found = gate_use_spare(w, gate, key)
    gate_announce(w, found)
    return found


cdef uint32_t gate_use_spare(Worker* w, Gate* gate, const Key* key) noexcept nogil:
    cdef uint8_t zero[16]
    cdef uint32_t found
    cdef Udp* udp
    memset(zero, 0, sizeof(zero))
    gate.spare_count -= 1
    found = gate.spares[gate.spare_count]
    udp = &w.core.udps[found]
    udp.key = key[0]
    udp.has_local = memcmp(&udp.key.local[0], zero, sizeof(zero)) != 0
    gate_list(w, gate, found)
    gate_crowd(gate, key)[0] += 1
    add_own64(&w.counters.peers_waiting, 1)
    return found


# One event per peer and link that it wants: at most one is unanswered, see ring.pxi.
cdef void gate_announce(Worker* w, uint32_t slot) noexcept nogil:
    NP_BUG(not ring_put(&w.outbox, (<uint64_t>EVENT_PEER << EVENT_SHIFT) | slot),
           &w.counters.bugs, b"outbox full")
    w.must_ring = 1


# Each peer and relay of this batch takes its chain.
cdef void gate_hand_out(Worker* w) noexcept nogil:
    cdef Mail* mail = w.mail
    cdef uint32_t k
    cdef uint32_t slot
    cdef Flow* flow
    cdef Udp* udp
    for k in range(mail.touched_count):
        slot = mail.touched[k]
        flow = &w.core.flows[slot]
        udp = &w.core.udps[slot]
        if flow.kind == KIND_PEER:
            gate_park(w, udp)
        else:
            flow.active_ms = w.now_ms
            udp_link_post(w, flow, slot)
        udp.batch_first = NONE_SLOT


# Keep the chained datagrams of a peer until its link is there; the newest are worth most.
cdef void gate_park(Worker* w, Udp* udp) noexcept nogil:
    cdef Mail* mail = w.mail
    cdef Udp* own = &w.core.udps[udp.gate]
    cdef uint32_t i = udp.batch_first
    cdef const char* data
    cdef size_t left
    cdef size_t size
    cdef bint is_done
    while i != NONE_SLOT:
        data = <const char*>mail.rooms[i].iov_base
        left = mail.incoming[i].msg_len
        is_done = False
        while not is_done:
            size = min(left, <size_t>mail.segments[i]) if mail.segments[i] else left
            if udp.is_cooling:
                tally_drop(w, own, T_NO_LINK, 1)
            else:
                while udp.queue.bytes and udp.queue.bytes + FRAME_HEAD + size > PARK_BYTES:
                    queue_take(w, &udp.queue, NULL, queue_frame(w, &udp.queue))
                    tally_drop(w, own, T_NO_LINK, 1)
                if not queue_put_frame(w, &udp.queue, data, size, PARK_KEEPS):
                    tally_drop(w, own, T_NO_LINK, 1)
            data += size
            left -= size
            is_done = left == 0
        i = mail.next[i]


# A bound relay begins: it takes the place of its peer, if that still waits. -> 1 it does.
cdef int gate_bind(Worker* w, Flow* flow, uint32_t slot) noexcept nogil:
    cdef Udp* udp = &w.core.udps[slot]
    cdef uint32_t old = <uint32_t>udp.peer
    cdef Flow* peer = &w.core.flows[old]
    cdef Udp* from_peer = &w.core.udps[old]
    cdef uint32_t state = load_acquire32(&peer.state)
    cdef Gate* gate
    cdef size_t size
    if load_relaxed32(&peer.generation) != <uint32_t>(udp.peer >> 32) or state != FLOW_OPEN:
        return 0
    if from_peer.is_cooling or not from_peer.is_listed:
        return 0
    if udp.is_raw and from_peer.queue.bytes == 0:
        flow_bury(w, peer, old, R_FINISHED, 0, 0)       # all it had to ask was lost
        return 0
    gate = w.core.udps[udp.gate].own
    udp.key = from_peer.key
    udp.has_local = from_peer.has_local
    udp.limit = w.core.udps[udp.gate].limit
    udp.gso = gate.gso
    if udp.is_raw:
        size = queue_frame(w, &from_peer.queue)
        queue_take(w, &from_peer.queue, w.scratch, size)
        if not queue_put(w, &udp.queue, w.scratch, size):
            tally_drop(w, &w.core.udps[udp.gate], T_NO_LINK, 1)
        if from_peer.queue.bytes:
            gate_announce(w, old)
            return 1
    else:
        udp.queue = from_peer.queue
        queue_clear(&from_peer.queue)
    flow_bury(w, peer, old, R_FINISHED, 0, 0)
    if not udp.is_raw:
        gate_list(w, gate, slot)
        list_append(w.core.flows, &gate.young, LINK_YOUNG, slot)
    return 1


# Wait for room in the gate's socket.
cdef void gate_block(Worker* w, Udp* udp, uint32_t slot) noexcept nogil:
    cdef Flow* flow = &w.core.flows[udp.gate]
    cdef Gate* gate = w.core.udps[udp.gate].own
    udp.is_blocked = 1
    list_append(w.core.flows, &gate.blocked, LINK_BLOCKED, slot)
    if gate.blocked.count == 1:
        flow.legs[0].bits &= ~<uint32_t>MAY_WRITE
        udp_watch(w, flow, udp.gate, 0, 1)


cdef void gate_unblock(Worker* w, Flow* flow, uint32_t slot) noexcept nogil:
    cdef Gate* gate = w.core.udps[slot].own
    cdef uint32_t found
    udp_watch(w, flow, slot, 0, 0)
    while gate.blocked.count:
        found = gate.blocked.first
        list_remove(w.core.flows, &gate.blocked, LINK_BLOCKED, found)
        w.core.udps[found].is_blocked = 0
        flow_want_turn(w, &w.core.flows[found], found)


# Places are short: end relays that are over by all appearance. Each call goes on where the last
# one has stopped.
cdef void gate_relieve(Worker* w, Gate* gate) noexcept nogil:
    gate_relieve_grown(w, gate)
    gate_relieve_young(w, gate)


# Streams that have been silent for so long that few who use them would mind.
cdef void gate_relieve_grown(Worker* w, Gate* gate) noexcept nogil:
    cdef uint32_t looks = min(gate.grown.count, <uint32_t>RELIEF_LOOKS)
    cdef uint32_t slot
    cdef Flow* flow
    while looks:
        looks -= 1
        slot = gate.grown.first
        flow = &w.core.flows[slot]
        if w.now_ms - flow.active_ms >= RELIEF_GROWN_MS:
            flow_bury(w, flow, slot, R_IDLE, 0, 0)
        else:
            list_remove(w.core.flows, &gate.grown, LINK_YOUNG, slot)
            list_append(w.core.flows, &gate.grown, LINK_YOUNG, slot)


cdef void gate_relieve_young(Worker* w, Gate* gate) noexcept nogil:
    cdef uint32_t looks = min(gate.young.count, <uint32_t>RELIEF_LOOKS)
    cdef uint32_t slot
    cdef Flow* flow
    cdef Udp* udp
    cdef uint64_t silent
    while looks:
        looks -= 1
        slot = gate.young.first
        flow = &w.core.flows[slot]
        udp = &w.core.udps[slot]
        silent = w.now_ms - flow.active_ms
        if udp.tally[T_DATAGRAMS_DOWN] > 1 and flow.active_ms - udp.born_ms >= RELIEF_YOUNG_MS:
            gate_grow_up(w, gate, slot)
        elif silent >= RELIEF_UNANSWERED_MS or (
            udp.tally[T_DATAGRAMS_DOWN] and silent >= RELIEF_ANSWERED_MS
        ):
            flow_bury(w, flow, slot, R_IDLE, 0, 0)
        else:
            list_remove(w.core.flows, &gate.young, LINK_YOUNG, slot)
            list_append(w.core.flows, &gate.young, LINK_YOUNG, slot)


cdef inline void gate_grow_up(Worker* w, Gate* gate, uint32_t slot) noexcept nogil:
    list_remove(w.core.flows, &gate.young, LINK_YOUNG, slot)
    list_append(w.core.flows, &gate.grown, LINK_YOUNG, slot)
    w.core.udps[slot].is_grown = 1


# The end of a bound relay or a peer: its source is forgotten, or ignored for a moment.
cdef void gate_part(Worker* w, Flow* flow, uint32_t slot, int reason) noexcept nogil:
    cdef Udp* udp = &w.core.udps[slot]
    cdef Udp* own = &w.core.udps[udp.gate]
    cdef Gate* gate
    cdef uint64_t age = w.now_ms - udp.born_ms
    cdef uint32_t cool
    if not udp.is_listed:
        return                  # its gate may be gone, and the slot another's
    gate = own.own
    gate_unlist(w, gate, slot)
    if flow.kind == KIND_PEER:
        tally_drop(w, own, T_NO_LINK, queue_drop_frames(w, &udp.queue))
        gate_crowd(gate, &udp.key)[0] -= 1
        take_own64(&w.counters.peers_waiting, 1)
        if reason != R_ABORTED:
            return
        age = 0
    else:
        list_remove(w.core.flows, &gate.grown if udp.is_grown else &gate.young, LINK_YOUNG, slot)
    if reason == R_IDLE or age >= COOL_MS or gate.spare_count == 0 or own.is_closing:
        return
    cool = gate_use_spare(w, gate, &udp.key)
    w.core.udps[cool].is_cooling = 1
    flow = &w.core.flows[cool]
    flow.active_ms = w.now_ms
    flow.idle_ms = <uint32_t>(COOL_MS - age)
    wheel_put(w, flow, cool)


# The end of a gate is the end of all that came through it.
cdef void gate_close(Worker* w, uint32_t slot) noexcept nogil:
    cdef Flow* flows = w.core.flows
    cdef uint32_t found = w.all.first
    cdef uint32_t next
    w.core.udps[slot].is_closing = 1
    while found != NONE_SLOT:
        next = flows[found].links[LINK_ALL].next
        if flows[found].kind in (KIND_PEER, KIND_BOUND) and w.core.udps[found].gate == slot:
            flow_bury(w, &flows[found], found, R_ABORTED, 0, 0)
        found = next


# -> 0 and udp.own, or -errno. Runs on: control plane.
cdef int gate_make(Udp* udp, uint64_t seed) noexcept nogil:
    cdef void* where = NULL
    cdef int rc = sys_map(sizeof(Gate) + GATE_BUCKETS * sizeof(uint32_t), &where)
    if rc < 0:
        return rc
    udp.own = <Gate*>where
    udp.own.buckets = <uint32_t*>(<char*>where + sizeof(Gate))
    udp.own.seed = seed
    list_clear(&udp.own.blocked)
    list_clear(&udp.own.young)
    list_clear(&udp.own.grown)
    return 0


# Of a gate that has ended, or never began; others have none. Runs on: control plane.
cdef void gate_free(Udp* udp) noexcept nogil:
    if udp.own != NULL:
        sys_unmap(udp.own, sizeof(Gate) + GATE_BUCKETS * sizeof(uint32_t))
        udp.own = NULL
