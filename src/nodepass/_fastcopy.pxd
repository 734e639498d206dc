# Structs, states and limits of the engine; the bodies are in fastcopy/*.pxi.
#
# Who writes what:  [c] the control plane (Python thread, GIL held)
#                   [w] the one worker that owns the flow, from admission to completion
# A field without an atomic accessor is handed over whole through a ring (release/acquire)
# and never touched by both sides at once.

from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t

from nodepass._linux cimport epoll_event, iovec, mmsghdr, pthread_t, sockaddr_in6

cdef enum:
    NONE_SLOT = 0xFFFFFFFF      # "no flow" in every intrusive list
    CACHE_LINE = 64             # bytes; keeps the two ends of a ring on different lines

cdef enum:                      # reasons of a completion; mirrored as REASON_* for Python
    R_FINISHED = 0
    R_RESET = 1
    R_ABORTED = 2
    R_IDLE = 3
    R_UNMET = 4                 # its second side could not be connected

cdef enum:                      # low bits of an order in a worker's inbox
    ORDER_ADMIT = 0
    ORDER_ABORT = 1
    ORDER_TOUCH = 2             # look at Udp.wishes
    ORDER_DOUBT = 3             # look at Flow.doubts
    ORDER_BITS = 2

cdef enum:                      # Udp.wishes
    WISH_LIMIT = 1              # take over Udp.wished_ms
    WISH_SHUT = 2
    WISH_RELIEVE = 4
    WISH_TARGET = 8             # take over Udp.fresh

cdef enum:                      # Flow.doubts; the first two are the sides, 1 << index
    DOUBT_A = 1
    DOUBT_B = 2
    DOUBT_QUIET = 4             # also if nothing waits for an answer

cdef enum:                      # what an item of an outbox is about; above its slot
    EVENT_ENDED = 0
    EVENT_PEER = 1
    EVENT_SHIFT = 32

cdef enum:                      # what a flow is
    KIND_RELAY = 0              # two streams; the second may have to be dialled first
    KIND_HANDSHAKE = 1          # one leg, lent by [c]: never closed here
    # UDP; all from here on have a Udp beside them. udp.pxi, gate.pxi
    KIND_GATE = 2               # leg 0: a bound socket
    KIND_PEER = 3               # no leg: a source without a link, or the room for one
    KIND_BOUND = 4              # leg 0: none, the gate's is used; leg 1: its link
    KIND_DIALLED = 5            # leg 0: a link; leg 1: a connected socket

# FlowState, moved by flow_move() only:
#
#   FREE --relay()--> QUEUED --inbox--> OPEN --end--> DEAD --grave--> DONE --poll()--> FREE
#        [c]                 [w]             [w]           [w]             [c]
#
# A flow that dials is OPEN, too.
cdef enum FlowState:
    FLOW_FREE = 0
    FLOW_QUEUED = 1
    FLOW_OPEN = 2
    FLOW_DEAD = 3
    FLOW_DONE = 4

# WayState:  OPEN --EOF(src), everything delivered, SHUT_WR(dst)--> SHUT
cdef enum WayState:
    WAY_OPEN = 0
    WAY_SHUT = 1

cdef enum:                      # Leg.bits: the kernel's last word about one socket
    MAY_READ = 1
    MAY_WRITE = 2
    SEEN_RDHUP = 4              # a FIN is queued: a short read does not mean "drained"
    SEEN_URGENT = 8             # recv stops at the urgent mark: neither does it here
    SEEN_ERROR = 16             # an error waits behind what the socket has received
    # Of TLS flows only:
    HAS_ENDED = 32              # EOF was read: close_notify, or a FIN on a plain leg
    TLS_HOLDS = 64              # its SSL may hold bytes from before: read it, not the socket
    TLS_OWES = 128              # its SSL may hold output that nobody asked for
    TLS_NOTIFIED = 256          # our close_notify is made: nothing may follow it
    TLS_STALLED = 512           # it writes nothing before it has read on

cdef enum:                      # which of Flow.links a list uses
    LINK_ALL = 0
    LINK_READY = 1              # also the grave: a dead flow is never ready
    LINK_WHEEL = 2
    LINK_BLOCKED = 3            # of a gate: relays that wait for room in its socket
    LINK_YOUNG = 4              # of a gate: its relays, young or grown, for gate_relieve()
    LINK_KINDS = 5

cdef struct Leg:
    int fd                      # owned; -1 once closed
    uint32_t bits
    void* tls                   # SSL of this leg, lent by [c]; NULL: plain bytes
    void* tls_in                # its BIO from the network
    void* tls_out               # its BIO to the network
    # Whether its far end is there, see pulse.pxi:
    uint64_t heard_ms           # last sign of life that a look has seen; 0: none was looked for
    uint64_t since_ms           # when that look was
    uint64_t doubted_ms         # 0: its end is not in doubt
    uint32_t missed             # resends and probes unanswered at that look
    uint8_t is_probed           # asked, although nothing waits for an answer
    uint8_t is_hurried          # its resends do not slow down without bound

cdef struct Way:
    uint64_t delivered          # atomic: [w] writes, live() reads
    char* parked                # bytes that dst did not take; NULL: none
    size_t parked_from
    size_t parked_to
    int32_t buffer              # pool index of `parked`; -1: from head_take()
    int pipe_read               # -1: this way holds no pipe
    int pipe_write
    uint32_t pipe_bytes         # bytes inside the pipe
    uint32_t pipe_size
    # Large reads in a row (copying), small fills in a row (bulk), doublings of a read (TLS).
    uint32_t streak
    uint8_t state
    uint8_t bulk                # splice is the mode of choice
    uint8_t no_splice           # the kernel refused splice for these sockets
    # Of TLS flows only:
    uint8_t is_tls              # src or dst is a TLS leg
    uint32_t fruitless          # bytes of ciphertext in a row that held no plaintext
    char* head                  # plaintext that is to be sealed before anything is read
    size_t head_from
    size_t head_to
    size_t parked_room          # bytes that `parked` can hold
    size_t owed                 # plaintext in the records that are being sent, ...
    size_t paid                 # ... how much of it is counted as delivered, ...
    size_t shipped              # ... and how many bytes of the records are out
    size_t record               # bytes on the wire of a full record; 0: none since tls_slim()

cdef struct Link:
    uint32_t next
    uint32_t prev

cdef struct Flow:
    uint32_t generation         # atomic: [c] writes while FREE
    uint32_t state              # atomic: a stale ABORT looks at it, see worker_run_inbox()
    uint32_t worker             # [c]
    uint8_t abort_asked         # [c]
    uint8_t is_ready            # on the ready list
    uint8_t is_breaking         # a leg is dead; its last words are being delivered
    uint8_t kind                # KIND_*
    uint8_t is_shaken           # its handshake is done
    uint8_t is_dialling         # leg 1 has no answer yet, see tcp_dial.pxi
    uint8_t is_calm             # a look found nothing unanswered, and it had no turn since
    uint8_t reason
    uint8_t side
    int32_t code
    uint64_t detail             # OpenSSL's packed error code behind EBADMSG
    uint32_t idle_ms            # 0: no limit; of a dial: until it must have its answer
    uint32_t later_idle_ms      # of a dial: idle_ms of the relay that it becomes
    uint32_t bucket             # of the wheel, while idle_ms > 0
    uint64_t active_ms          # last byte in either direction
    uint32_t doubts             # atomic: [c] sets bits, [w] takes them
    Link links[LINK_KINDS]
    Leg legs[2]                 # a, b
    Way ways[2]                 # a -> b, b -> a
    sockaddr_in6 goal           # where leg 1 is dialled, IPv4 or IPv6

cdef struct List:
    uint32_t first
    uint32_t last
    uint32_t count

cdef struct Key:                # who sent a datagram, and to which of our addresses
    uint8_t source[16]          # IPv4 as ::ffff:a.b.c.d
    uint8_t local[16]           # zero unless the gate is bound to all addresses
    uint32_t scope              # of a link-local source
    uint16_t port               # network order
    uint16_t zero

cdef struct Queue:              # bytes in pages, see cell.pxi
    uint32_t first              # cell; NONE_SLOT: empty
    uint32_t last
    uint32_t start              # offset in `first`
    uint32_t stop               # offset in `last`
    size_t bytes

cdef enum:                      # Udp.tally, in the order of UdpCounts
    T_DATAGRAMS_UP = 0
    T_DATAGRAMS_DOWN = 1
    T_BYTES_UP = 2
    T_BYTES_DOWN = 3
    T_TOO_LARGE = 4
    T_SLOW_LINK = 5
    T_NO_LINK = 6
    T_OVERRUN = 7
    T_UNSENT = 8
    T_REFUSED = 9
    TALLIES = 10

cdef enum:
    MAX_WAITING = 4096          # peers of a gate without a link
    CROWDS = 4096               # counts of such peers by their address: few share one by chance

cdef struct Gate:               # of a gate's flow; made and freed by [c]
    uint32_t* buckets           # GATE_BUCKETS; slot + 1 of a peer or relay, 0: none
    uint64_t seed               # of the hash: secret, or strangers could choose one bucket
    uint32_t lent               # [c]: peers given out and not yet polled
    uint32_t waiting            # [c]: how many that should be
    uint32_t spare_count
    uint32_t spares[MAX_WAITING]
    uint16_t crowds[CROWDS]     # peers in use, by gate_crowd()
    List blocked
    List young
    List grown
    uint8_t is_shut
    uint8_t is_wildcard         # replies have to name their source address
    uint8_t is_inet             # AF_INET, not AF_INET6
    uint8_t gso

cdef struct Udp:                # beside the Flow of the same slot, for the UDP kinds
    uint32_t wishes             # atomic: [c] sets bits, [w] takes them
    uint32_t wished_ms          # atomic: behind WISH_LIMIT
    uint32_t fresh              # atomic: behind WISH_TARGET, descriptor + 1; its taker owns it
    uint64_t tally[TALLIES]     # atomic: [w] writes, udp_counts() reads
    Gate* own                   # of a gate
    uint64_t peer               # of a fresh bound relay: token of its peer
    Key key                     # of a peer: [w] writes before it is announced
    uint32_t gate               # slot
    uint32_t gate_generation
    uint32_t next               # in its bucket: slot + 1, 0: none
    uint32_t limit              # longest datagram
    uint32_t socket_lost        # SO_RXQ_OVFL as it was last seen
    uint32_t batch_first        # of the batch that is being sorted; NONE_SLOT: nothing
    uint32_t batch_last
    uint64_t born_ms
    uint64_t refused_ms         # first refusal in a row, 0: none
    Queue queue                 # frames for the link
    Queue rest                  # from the link: the beginning of a frame, or what waits for room
    uint32_t raw_ms             # read time-out of a raw relay
    uint8_t is_raw
    uint8_t is_shot             # raw: the one datagram is on its way
    uint8_t is_answered         # raw: so is the answer
    uint8_t is_listed           # in the table of its gate
    uint8_t is_met              # [c]: its Newcomer was polled
    uint8_t is_cooling
    uint8_t is_blocked          # waits for room in the UDP socket
    uint8_t has_local
    uint8_t local_worked        # something has left from there
    uint8_t is_grown            # among the grown ones of its gate
    uint8_t is_closing          # of a gate
    uint8_t gso
    uint8_t is_retried          # the error before may have been an earlier datagram's

cdef enum:
    MAIL_BATCH = 64             # datagrams per system call: engine.md, targets.md
    MAIL_ROOM = 65536           # bytes: any datagram, and any run of them that GRO has joined
    MAIL_STRIDE = 67712         # apart by 34 lines more, or all would share a few cache sets
    MAIL_PIECES = 1024          # datagrams in one sending system call (UIO_MAXIOV of the kernel)
    MAIL_CONTROL = 16           # words of ancillary data: three short messages need 12

cdef struct Mail:               # the batch in work; one per worker
    mmsghdr incoming[MAIL_BATCH]
    mmsghdr outgoing[MAIL_BATCH]
    iovec rooms[MAIL_BATCH]
    iovec pieces[MAIL_PIECES]
    sockaddr_in6 names[MAIL_BATCH]
    sockaddr_in6 name           # of whom all outgoing ones are for
    uint64_t controls[MAIL_BATCH][MAIL_CONTROL]
    uint64_t control[MAIL_BATCH][MAIL_CONTROL]
    Key keys[MAIL_BATCH]
    uint32_t next[MAIL_BATCH]   # the next of the same relay, NONE_SLOT: none
    uint32_t segments[MAIL_BATCH]   # bytes of each joined datagram, 0: it is just one
    uint32_t frames[MAIL_BATCH]     # datagrams of an outgoing message
    uint32_t touched[MAIL_BATCH]    # slots of those that this batch is for
    uint32_t touched_count
    uint32_t used               # of `incoming`: to be made ready again
    uint8_t is_ready            # the pointers stand

cdef struct Ring:               # one producer, one consumer; see ring.pxi
    uint64_t* cells
    uint64_t mask
    char pad0[CACHE_LINE]
    uint64_t head               # atomic, consumer
    char pad1[CACHE_LINE]
    uint64_t tail               # atomic, producer
    char pad2[CACHE_LINE]

cdef struct Counters:           # atomic: [w] writes, statistics() reads
    uint64_t bytes_up
    uint64_t bytes_down
    uint64_t parked_bytes
    uint64_t buffers_in_use
    uint64_t pipes_in_use
    uint64_t pipes_pooled
    uint64_t splice_promotions
    uint64_t turns
    uint64_t wakeups
    uint64_t stale_events
    uint64_t bugs
    uint64_t fds_open
    uint64_t heads_open
    uint64_t handshakes_failed
    uint64_t peers_waiting
    uint64_t datagrams_up
    uint64_t datagrams_down
    uint64_t datagrams_dropped
    uint64_t datagram_bytes_held

cdef enum:
    MAX_EVENTS = 256            # per epoll_wait; 3 KiB, and one call empties 128 busy flows
    MAX_POOLED_PIPES = 16       # clean pipes kept per worker
    WHEEL_BUCKETS = 512         # x TICK_MS = 51 s ahead; later deadlines go round again
    MAX_BUFFERS = 128           # per worker: the bound of parked memory, 64 MiB at 512 KiB

cdef struct Pipe:
    int read
    int write
    uint32_t size

cdef struct Core                # forward

cdef struct Worker:
    Core* core
    pthread_t thread
    int epoll
    int wake                    # eventfd, rung by [c]
    uint32_t index
    uint32_t load               # [c]: flows given out and not yet polled
    uint32_t round_turns        # turns between two looks at events and orders
    uint8_t is_started          # [c]
    uint8_t is_joined           # [c]
    char pad0[CACHE_LINE]
    uint32_t wake_rung          # atomic, both
    uint32_t stop               # atomic, [c]
    uint32_t exited             # atomic, [w]
    char pad1[CACHE_LINE]
    Ring inbox                  # [c] -> [w]
    Ring outbox                 # [w] -> [c]
    Counters counters
    char pad2[CACHE_LINE]
    # From here on: the worker's own.
    uint64_t now_ms
    char* buffers               # MAX_BUFFERS x BUFFER_BYTES, touched lazily
    char* scratch               # the buffer every recv starts in
    int32_t scratch_index
    uint32_t free_buffers
    int32_t buffer_stack[MAX_BUFFERS]
    Pipe pool[MAX_POOLED_PIPES]
    char* cells                 # MAX_CELLS x CELL_BYTES, touched lazily
    uint32_t* cell_next
    uint32_t* cell_stack        # used before and free
    uint32_t cells_free         # of the stack
    uint32_t cells_fresh        # first never used
    char* mailbags              # MAIL_BATCH x MAIL_STRIDE, touched lazily
    Mail* mail
    uint8_t must_ring           # a newcomer waits for poll()
    uint32_t pooled
    uint32_t pipes_large        # of PIPE_BYTES, in use or pooled
    uint64_t pipes_dry_until_ms
    List all
    List ready
    List grave
    uint64_t tick
    uint64_t wheel_next         # no bucket before this tick is occupied
    uint32_t wheel_count
    List wheel[WHEEL_BUCKETS]
    uint64_t look_ms            # when the flows are looked at next, 0: never; see pulse.pxi
    uint32_t looks_left         # of the looks that are under way
    uint32_t doubted            # legs in doubt
    epoll_event events[MAX_EVENTS]

cdef struct Core:               # everything that must outlive the Python object
    uint32_t references         # atomic: the Engine and every worker thread
    uint32_t threads            # that relays are given to
    uint32_t crew               # threads + 1: the last worker, started on demand, has handshakes
    uint32_t capacity           # slots
    uint32_t flow_limit         # of them for all but peers
    uint32_t use_splice
    uint64_t patience_ms        # see pulse.pxi
    uint32_t large_pipes        # per worker
    uint32_t can_forget_cells   # pages are not larger than cells: one goes without its neighbours
    int notify                  # eventfd, rung by workers, watched by asyncio
    uint32_t notify_rung        # atomic, both
    int done                    # eventfd, rung by a worker as its last act but one
    Flow* flows
    uint32_t* free_slots        # [c] stack of slots used before
    uint32_t free_count
    uint32_t fresh              # [c] first slot never used
    uint32_t open_count         # [c]
    uint64_t total              # [c]
    uint64_t refused            # [c]
    uint64_t handshakes         # [c]
    uint32_t lent               # [c]: of `open_count`, room for peers
    uint32_t announced          # [c]: of `lent`, those that have had their Newcomer
    uint32_t gates              # [c]
    uint32_t* taken             # atomic, by descriptor: 1 it is one of ours; [c] sets, [w] clears
    Udp* udps                   # beside `flows`
    Worker* workers

cdef struct Handles:            # of a Connection; see handles() in _openssl.py
    void* ssl
    void* bio_in
    void* bio_out

cdef struct Batch:              # what one round of SSL_read gave
    size_t size
    int code                    # 0, or the errno that ends the flow
    uint64_t detail

cdef struct Size:
    size_t flows
    size_t free_slots
    size_t workers
    size_t inbox
    size_t outbox
    size_t buffers
    size_t udps
    size_t cells
    size_t cell_links
    size_t mailbags
    size_t mail
    size_t taken
