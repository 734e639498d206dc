/* udpload: UDP load, echo and sink, quick enough that what lies between them is what is measured.
 *
 *     cc -std=c11 -O2 -Wall -Wextra -Werror -o udpload udpload.c        (Linux, no dependency)
 *
 * One thread, batches of BATCH datagrams (recvmmsg, sendmmsg), one JSON line at the end. What may
 * be measured twice is measured per datagram: each carries who sent it, its number and words that
 * follow from both, so that loss, reordering, duplicates, damage and a delivery to the wrong
 * visitor are told apart. `usage` below says how it is called, README.md what the figures mean.
 *
 * A datagram is 8-byte words, all in network order; the last may be cut short:
 *
 *     0        4         8          16      24
 *     | run    | visitor | sequence | check | check + 1 * STEP | check + 2 * STEP | ...
 *
 * `run` is random for each process, `sequence` counts from 0 for each visitor, and `check` is a
 * hash of all three and of the size.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <endian.h>
#include <errno.h>
#include <inttypes.h>
#include <linux/sock_diag.h>
#include <netdb.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum {
    BATCH = 64,             /* datagrams a system call; beyond it the call no longer shows */
    HEADER = 24,            /* bytes */
    LARGEST = 65507,        /* bytes, the most that UDP over IPv4 carries */
    ROOM = 65536 + 25 * 64, /* bytes a receive buffer; not a power of two, or all of them would
                               compete for the same lines of the cache */
    BUFFER = 8 << 20,       /* bytes of socket buffer asked for, thousands of datagrams */
    MARKS = 1 << 20,        /* datagrams remembered, all visitors together: seconds of them */
    FEWEST_MARKS = 1024,    /* for one visitor */
    TURNS = 64,             /* batches taken from one socket at a time; the clock waits */
    EVENTS = 256,           /* ready sockets taken from epoll at a time */
    STEPS = 64,             /* of the histogram in each power of two: 1.6 % */
    WINDOW_MOST = 65536,
    VISITORS_MOST = 60000,  /* local ports, if all go to one address */
    SOURCES = 1 << 17,      /* places of the sink's table, a power of two above VISITORS_MOST */
    SEEN = 1 << 14,         /* datagrams the sink looks back for duplicates, for each source */
};

static const int64_t SECOND = 1000000000;         /* all times are nanoseconds */
static const int64_t LIMIT = 200 * 1000 * 1000;   /* not answered for so long means lost */
static const int64_t LINGER = 20 * 1000 * 1000;   /* listened on after the last answer */
static const int64_t TICK = 5 * 1000 * 1000;      /* between two looks for what is lost */
static const int64_t NAP = 100 * 1000 * 1000;     /* longest sleep: a signal may have missed */
static const uint64_t STEP = 0x9e3779b97f4a7c15u; /* odd, all bits busy */

static const char usage[] =
    "usage: udpload echo   HOST:PORT    send back whatever comes, until SIGTERM or SIGINT\n"
    "       udpload sink   HOST:PORT    count what `rate --one-way` sends, until then\n"
    "       udpload window HOST:PORT --size N --window N --visitors N --seconds S [--warmup S]\n"
    "       udpload rate   HOST:PORT --size N --rate N --visitors N --seconds S [--warmup S]\n"
    "                                [--one-way]\n"
    "\n"
    "echo and sink print `ready PORT` when they can be reached (port 0: the kernel picks one).\n"
    "All print one JSON line at the end.\n"
    "\n"
    "  --size N      bytes of payload, 24 to 65507\n"
    "  --window N    datagrams that each visitor keeps in flight: N * visitors in all; an answer\n"
    "                releases the next, and so does its absence for 200 ms, which counts as lost\n"
    "  --rate N      datagrams a second, all visitors together, at most 1 ms of them at once;\n"
    "                what could not be sent in time is skipped, not made up for\n"
    "  --visitors N  connected sockets, each with a port of its own\n"
    "  --seconds S   how long is measured, --warmup S how long before that (default: 0)\n"
    "  --one-way     expect no answers\n"
    "\n"
    "HOST is an IPv4 address, [IPv6] or a name.\n"
    "Exit codes: 0, 1 could not start, 2 wrong option.\n";

enum mode { ECHO = 1, SINK = 2, WINDOW = 4, RATE = 8 };

static struct {
    enum mode mode;
    const char *mode_name;
    const char *address;
    double size, window, visitors, rate, seconds, warmup;
    bool one_way;
} options;

static volatile sig_atomic_t is_stopped;

/* --- words --------------------------------------------------------------------------------- */

__attribute__((noreturn, format(printf, 2, 3))) static void die(int code, const char *format, ...)
{
    va_list list;
    va_start(list, format);
    fputs("udpload: ", stderr);
    vfprintf(stderr, format, list);
    fputc('\n', stderr);
    va_end(list);
    exit(code);
}

static void *room_for(size_t count, size_t size)
{
    void *room = calloc(count, size);
    if (room == NULL)
        die(1, "no memory for %zu times %zu bytes", count, size);
    return room;
}

static int64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * SECOND + time.tv_nsec;
}

static double seconds_of(struct timeval time)
{
    return (double)time.tv_sec + (double)time.tv_usec / 1e6;
}

static double ratio(double part, double whole)
{
    return whole > 0 ? part / whole : 0;
}

/* --- datagrams ----------------------------------------------------------------------------- */

struct header {
    uint32_t run, visitor;
    uint64_t sequence;
};

static uint64_t load64(const unsigned char *from)
{
    uint64_t word;
    memcpy(&word, from, 8);
    return be64toh(word);
}

static void store64(unsigned char *into, uint64_t word)
{
    word = htobe64(word);
    memcpy(into, &word, 8);
}

/* The finalizer of MurmurHash3: every bit of the input shows in every bit of the output. */
static uint64_t mix(uint64_t word)
{
    word = (word ^ word >> 33) * 0xff51afd7ed558ccdu;
    word = (word ^ word >> 33) * 0xc4ceb9fe1a85ec53u;
    return word ^ word >> 33;
}

static uint64_t check_of(uint64_t names, uint64_t sequence, size_t size)
{
    return mix(mix(names + size * STEP) ^ sequence);
}

static void compose(unsigned char *into, size_t size, struct header header)
{
    uint64_t names = (uint64_t)header.run << 32 | header.visitor;
    uint64_t word = check_of(names, header.sequence, size);
    store64(into, names);
    store64(into + 8, header.sequence);
    store64(into + 16, word);
    size_t at = HEADER;
    for (; at + 8 <= size; at += 8)
        store64(into + at, word += STEP);
    unsigned char last[8];
    store64(last, word + STEP);
    memcpy(into + at, last, size - at);
}

/* -> whether these are the bytes that compose() made; the header is filled in if so */
static bool parse(const unsigned char *from, size_t size, struct header *header)
{
    if (size < HEADER)
        return false;
    uint64_t names = load64(from);
    *header = (struct header){(uint32_t)(names >> 32), (uint32_t)names, load64(from + 8)};
    uint64_t word = load64(from + 16);
    uint64_t wrong = word ^ check_of(names, header->sequence, size);
    size_t at = HEADER;
    for (; at + 8 <= size; at += 8)
        wrong |= load64(from + at) ^ (word += STEP);
    unsigned char last[8];
    store64(last, word + STEP);
    return wrong == 0 && memcmp(from + at, last, size - at) == 0;
}

/* --- batches ------------------------------------------------------------------------------- */

struct batch {
    struct mmsghdr heads[BATCH];
    struct iovec parts[BATCH];
    struct sockaddr_storage peers[BATCH];
    size_t room;
};

static struct {
    uint64_t receives, sends, waits; /* system calls */
} calls;

static struct batch *new_batch(size_t room)
{
    struct batch *batch = room_for(1, sizeof *batch);
    unsigned char *space = room_for(BATCH, room);
    batch->room = room;
    for (int i = 0; i < BATCH; i++) {
        batch->parts[i] = (struct iovec){space + (size_t)i * room, room};
        batch->heads[i].msg_hdr.msg_iov = &batch->parts[i];
        batch->heads[i].msg_hdr.msg_iovlen = 1;
    }
    return batch;
}

static unsigned char *bytes_of(struct batch *batch, int i)
{
    return batch->parts[i].iov_base;
}

/* -> how many came, 0 if none did; errors are those of earlier datagrams, and are over by now */
static int receive(int fd, struct batch *batch, int flags)
{
    calls.receives++;
    int count = recvmmsg(fd, batch->heads, BATCH, flags, NULL);
    return count < 0 ? 0 : count;
}

/* -> how many went; fewer than asked with errno set if the next one could not */
static int transmit(int fd, struct mmsghdr *heads, int count)
{
    calls.sends++;
    errno = 0;
    int sent = sendmmsg(fd, heads, (unsigned)count, MSG_DONTWAIT);
    return sent < 0 ? 0 : sent;
}

/* --- addresses ----------------------------------------------------------------------------- */

static struct addrinfo *resolve(bool is_server)
{
    char host[256];
    const char *address = options.address, *colon = strrchr(address, ':');
    size_t length = colon == NULL ? 0 : (size_t)(colon - address);
    if (colon == NULL || length >= sizeof host)
        die(2, "%s: is not HOST:PORT", address);
    char *end;
    unsigned long port = strtoul(colon + 1, &end, 10);
    if (colon[1] < '0' || colon[1] > '9' || *end != 0 || port > 65535 || (!port && !is_server))
        die(2, "%s: the port is not a number from %d to 65535", address, !is_server);
    bool is_bracketed = length > 2 && address[0] == '[' && colon[-1] == ']';
    snprintf(host, sizeof host, "%.*s", (int)length - 2 * is_bracketed, address + is_bracketed);
    if (!is_bracketed && strpbrk(host, ":[]") != NULL)
        die(2, "%s: an IPv6 address is written [::1]:9000", address);
    if (host[0] == 0 && !is_server)
        die(2, "%s: there is no host in it", address);
    struct addrinfo hints = {.ai_socktype = SOCK_DGRAM, .ai_flags = is_server ? AI_PASSIVE : 0};
    struct addrinfo *found;
    int error = getaddrinfo(host[0] ? host : NULL, colon + 1, &hints, &found);
    if (error != 0)
        die(1, "%s: %s", address, gai_strerror(error));
    return found;
}

static void enlarge(int fd)
{
    int size = BUFFER;
    if (setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &size, sizeof size) != 0)
        setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &size, sizeof size);
    if (setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &size, sizeof size) != 0)
        setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
}

/* -> a socket bound or connected to the first of these addresses that allows it */
static int open_socket(const struct addrinfo *found, bool is_server)
{
    for (; found != NULL; found = found->ai_next) {
        int fd = socket(found->ai_family, SOCK_DGRAM | SOCK_CLOEXEC, 0);
        if (fd < 0)
            continue;
        enlarge(fd);
        if ((is_server ? bind : connect)(fd, found->ai_addr, found->ai_addrlen) == 0)
            return fd;
        int error = errno;
        close(fd);
        errno = error;
    }
    die(1, "%s: %s", options.address, strerror(errno));
}

/* -> datagrams that the kernel dropped at this very socket for want of buffer */
static uint64_t drops_of(int fd)
{
    uint32_t figures[SK_MEMINFO_VARS] = {0};
    socklen_t size = sizeof figures;
    return getsockopt(fd, SOL_SOCKET, SO_MEMINFO, figures, &size) == 0 ? figures[SK_MEMINFO_DROPS]
                                                                       : 0;
}

static void print_costs(uint64_t drops)
{
    struct rusage use;
    getrusage(RUSAGE_SELF, &use);
    printf("\"receive_calls\": %" PRIu64 ", \"send_calls\": %" PRIu64 ", \"wait_calls\": %" PRIu64
           ", \"user_seconds\": %.3f, \"system_seconds\": %.3f, \"socket_drops\": %" PRIu64 "}\n",
           calls.receives, calls.sends, calls.waits, seconds_of(use.ru_utime),
           seconds_of(use.ru_stime), drops);
}

/* --- echo and sink ------------------------------------------------------------------------- */

static int serve(void)
{
    struct addrinfo *found = resolve(true);
    int fd = open_socket(found, true);
    freeaddrinfo(found);
    struct timeval nap = {0, (suseconds_t)(NAP / 1000)};
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &nap, sizeof nap);
    struct sockaddr_storage own;
    socklen_t size = sizeof own;
    getsockname(fd, (struct sockaddr *)&own, &size);
    in_port_t port = own.ss_family == AF_INET6 ? ((struct sockaddr_in6 *)&own)->sin6_port
                                               : ((struct sockaddr_in *)&own)->sin_port;
    printf("ready %d\n", ntohs(port));
    fflush(stdout);
    return fd;
}

static int run_echo(void)
{
    int fd = serve();
    struct batch *batch = new_batch(ROOM);
    uint64_t received = 0, sent = 0, bytes = 0;
    for (int count = BATCH; !is_stopped;) {
        for (int i = 0; i < count; i++) { /* both are in and out */
            batch->heads[i].msg_hdr.msg_name = &batch->peers[i];
            batch->heads[i].msg_hdr.msg_namelen = sizeof batch->peers[i];
            batch->parts[i].iov_len = batch->room;
        }
        count = receive(fd, batch, MSG_WAITFORONE);
        for (int i = 0; i < count; i++)
            bytes += batch->parts[i].iov_len = batch->heads[i].msg_len;
        received += (uint64_t)count;
        for (int done = 0; done < count;) {
            int went = transmit(fd, batch->heads + done, count - done);
            sent += (uint64_t)went;
            done += went > 0 ? went : 1; /* one that the kernel does not take is lost */
        }
    }
    printf("{\"mode\": \"echo\", \"received\": %" PRIu64 ", \"sent\": %" PRIu64
           ", \"bytes\": %" PRIu64 ", ", received, sent, bytes);
    print_costs(drops_of(fd));
    return 0;
}

struct source {
    struct header header; /* run and visitor; the sequence is the next one expected */
    uint64_t received;
    uint64_t seen[SEEN / 64];
};

static struct source *sources[SOURCES];

static struct {
    uint64_t datagrams, bytes, visitors, reordered, duplicates, stale, corrupt;
    int64_t first, last;
} sunk;

/* -> what is known of who sent this; NULL if the table is full */
static struct source *source_of(struct header header)
{
    uint64_t place = mix((uint64_t)header.run << 32 | header.visitor);
    for (int tries = 0; tries < SOURCES; tries++, place++) {
        struct source **found = &sources[place % SOURCES];
        if (*found == NULL) {
            *found = room_for(1, sizeof **found);
            (*found)->header = (struct header){header.run, header.visitor, 0};
            sunk.visitors++;
        }
        if ((*found)->header.run == header.run && (*found)->header.visitor == header.visitor)
            return *found;
    }
    return NULL;
}

static void sink_datagram(const unsigned char *bytes, size_t size)
{
    struct header header;
    sunk.datagrams++;
    sunk.bytes += size;
    struct source *source = parse(bytes, size, &header) ? source_of(header) : NULL;
    if (source == NULL) {
        sunk.corrupt++;
        return;
    }
    uint64_t sequence = header.sequence, *next = &source->header.sequence;
    if (sequence + SEEN < *next) {
        sunk.stale++;
        return;
    }
    uint64_t *word = &source->seen[sequence % SEEN / 64], bit = (uint64_t)1 << sequence % 64;
    if (sequence < *next) {
        if (*word & bit) {
            sunk.duplicates++;
            return;
        }
        sunk.reordered++;
    } else {
        /* Forget what those had that stood here SEEN before. */
        uint64_t from = sequence - *next >= SEEN ? sequence - SEEN + 1 : *next;
        for (uint64_t i = from; i <= sequence; i++)
            source->seen[i % SEEN / 64] &= ~((uint64_t)1 << i % 64);
        *next = sequence + 1;
    }
    *word |= bit;
    source->received++;
}

static int sink_batch(int fd, struct batch *batch, int flags)
{
    int count = receive(fd, batch, flags);
    if (count > 0) {
        sunk.last = now();
        sunk.first = sunk.first ? sunk.first : sunk.last;
    }
    for (int i = 0; i < count; i++)
        sink_datagram(bytes_of(batch, i), batch->heads[i].msg_len);
    return count;
}

static int run_sink(void)
{
    int fd = serve();
    struct batch *batch = new_batch(ROOM);
    while (!is_stopped)
        sink_batch(fd, batch, MSG_WAITFORONE);
    /* What had come before the signal counts. */
    for (int64_t end = now() + NAP; sink_batch(fd, batch, MSG_DONTWAIT) > 0 && now() < end;)
        ;
    uint64_t expected = 0, received = 0;
    for (int i = 0; i < SOURCES; i++)
        if (sources[i] != NULL) {
            expected += sources[i]->header.sequence;
            received += sources[i]->received;
        }
    double seconds = (double)(sunk.last - sunk.first) / 1e9;
    printf("{\"mode\": \"sink\", \"datagrams\": %" PRIu64 ", \"bytes\": %" PRIu64
           ", \"visitors\": %" PRIu64 ", \"received\": %" PRIu64 ", \"lost\": %" PRIu64
           ", \"loss\": %.9f, \"reordered\": %" PRIu64 ", \"duplicates\": %" PRIu64
           ", \"stale\": %" PRIu64 ", \"corrupt\": %" PRIu64
           ", \"seconds\": %.6f, \"datagrams_per_s\": %.1f, ",
           sunk.datagrams, sunk.bytes, sunk.visitors, received, expected - received,
           ratio((double)(expected - received), (double)expected), sunk.reordered,
           sunk.duplicates, sunk.stale, sunk.corrupt, seconds,
           ratio((double)sunk.datagrams, seconds));
    print_costs(drops_of(fd));
    return 0;
}

/* --- visitors ------------------------------------------------------------------------------
 *
 * A datagram's mark goes  FREE -> PENDING -> ANSWERED,  or  PENDING -> LOST -> ANSWERED  (late).
 * Marks are a ring: what is overtaken by a whole ring is lost before its 200 ms are over.
 */

enum { FREE, PENDING, ANSWERED, LOST };

struct mark {
    uint64_t state : 2;
    int64_t sent : 62; /* when, nanoseconds */
};

struct visitor {
    int fd;
    uint32_t number;
    uint64_t next;      /* sequence number of the next datagram */
    uint64_t oldest;    /* nothing before it is pending */
    uint64_t expected;  /* one more than the highest that came back */
    uint64_t measured;  /* first one after the warm-up */
    uint64_t in_flight; /* pending */
    struct mark *marks;
};

struct counts {
    uint64_t sent, echoed, lost, late, reordered, duplicates, corrupt, strays, skipped;
};

static struct counts warmup, measured;
static struct counts *current = &warmup; /* for what has no number of its own */
static struct visitor *visitors;
static uint32_t visitor_count, run;
static uint64_t ring; /* marks of a visitor, a power of two */
static uint64_t in_flight;
static struct batch *incoming, *outgoing;
static size_t datagram_size;
static int poller;

static struct {
    uint64_t buckets[64 * STEPS];
    uint64_t count, largest;
    double sum;
} rtt;

static void add_rtt(uint64_t took)
{
    int shift = took < STEPS ? 0 : 63 - __builtin_clzll(took) - __builtin_ctz(STEPS);
    rtt.buckets[(unsigned)shift * STEPS + (took >> shift)]++;
    rtt.count++;
    rtt.sum += (double)took;
    rtt.largest = took > rtt.largest ? took : rtt.largest;
}

/* -> microseconds that this part of the round trips did not pass */
static double rtt_at(double part)
{
    double wanted = part * (double)rtt.count;
    uint64_t passed = 0;
    for (unsigned i = 0; i < 64 * STEPS; i++) {
        passed += rtt.buckets[i];
        if (passed > 0 && (double)passed >= wanted) {
            unsigned shift = i < 2 * STEPS ? 0 : i / STEPS - 1;
            uint64_t width = (uint64_t)1 << shift, low = (i - shift * STEPS) * width;
            return ((double)low + (double)width / 2) / 1e3;
        }
    }
    return 0;
}

static void open_visitors(void)
{
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) == 0) {
        limit.rlim_cur = limit.rlim_max;
        setrlimit(RLIMIT_NOFILE, &limit);
    }
    visitor_count = (uint32_t)options.visitors;
    datagram_size = (size_t)options.size;
    ring = FEWEST_MARKS;
    while (ring < 4 * (uint64_t)options.window || ring < MARKS / visitor_count)
        ring *= 2;
    if (getrandom(&run, sizeof run, 0) != sizeof run)
        die(1, "no random numbers: %s", strerror(errno));
    incoming = new_batch(datagram_size + 64 + 1); /* one byte more, or a longer one looks right */
    outgoing = new_batch(datagram_size + 64);
    for (int i = 0; i < BATCH; i++)
        outgoing->parts[i].iov_len = datagram_size;
    poller = epoll_create1(EPOLL_CLOEXEC);
    visitors = room_for(visitor_count, sizeof *visitors);
    struct addrinfo *found = resolve(false);
    for (uint32_t i = 0; i < visitor_count; i++) {
        struct visitor *visitor = &visitors[i];
        visitor->fd = open_socket(found, false);
        visitor->number = i;
        visitor->measured = UINT64_MAX;
        if (!options.one_way)
            visitor->marks = room_for(ring, sizeof *visitor->marks);
        struct epoll_event event = {.events = EPOLLIN, .data.ptr = visitor};
        if (epoll_ctl(poller, EPOLL_CTL_ADD, visitor->fd, &event) != 0)
            die(1, "epoll: %s", strerror(errno));
    }
    freeaddrinfo(found);
}

static struct counts *counts_of(const struct visitor *visitor, uint64_t sequence)
{
    return sequence >= visitor->measured ? &measured : &warmup;
}

static struct mark *mark_of(const struct visitor *visitor, uint64_t sequence)
{
    return &visitor->marks[sequence & (ring - 1)];
}

/* The oldest one is no longer waited for. */
static void forget_oldest(struct visitor *visitor)
{
    struct mark *mark = mark_of(visitor, visitor->oldest);
    if (mark->state == PENDING) {
        mark->state = LOST;
        counts_of(visitor, visitor->oldest)->lost++;
        visitor->in_flight--;
        in_flight--;
    }
    visitor->oldest++;
}

static void expire(struct visitor *visitor, int64_t time)
{
    while (visitor->oldest < visitor->next) {
        struct mark *mark = mark_of(visitor, visitor->oldest);
        if (mark->state == PENDING && mark->sent + LIMIT > time)
            break;
        forget_oldest(visitor);
    }
}

static void expire_all(int64_t time)
{
    for (uint32_t i = 0; i < visitor_count; i++)
        expire(&visitors[i], time);
}

static void account(struct visitor *visitor, const struct mmsghdr *head, int64_t time)
{
    struct header header;
    if (head->msg_len != datagram_size
        || !parse(head->msg_hdr.msg_iov->iov_base, head->msg_len, &header)) {
        current->corrupt++;
        return;
    }
    if (header.run != run || header.visitor != visitor->number
        || header.sequence >= visitor->next || options.one_way) {
        current->strays++;
        return;
    }
    struct counts *counts = counts_of(visitor, header.sequence);
    if (header.sequence + ring < visitor->next) {
        counts->late++; /* or a duplicate: nobody remembers */
        return;
    }
    struct mark *mark = mark_of(visitor, header.sequence);
    if (mark->state == ANSWERED) {
        counts->duplicates++;
        return;
    }
    if (mark->state == PENDING) {
        visitor->in_flight--;
        in_flight--;
        counts->echoed++;
        if (counts == &measured)
            add_rtt((uint64_t)(time - mark->sent));
    } else {
        counts->late++;
    }
    mark->state = ANSWERED;
    if (header.sequence < visitor->expected)
        counts->reordered++;
    else
        visitor->expected = header.sequence + 1;
}

/* -> how many of `count` datagrams went; the others were not taken by the kernel */
static int send_some(struct visitor *visitor, int count)
{
    for (int i = 0; i < count; i++)
        compose(bytes_of(outgoing, i), datagram_size,
                (struct header){run, visitor->number, visitor->next + (uint64_t)i});
    int64_t time = now();
    int sent = transmit(visitor->fd, outgoing->heads, count);
    current->sent += (uint64_t)sent;
    for (int i = 0; i < sent && !options.one_way; i++) {
        if (visitor->next - visitor->oldest == ring)
            forget_oldest(visitor);
        *mark_of(visitor, visitor->next++) = (struct mark){.state = PENDING, .sent = time};
    }
    if (options.one_way) {
        visitor->oldest = visitor->next += (uint64_t)sent;
    } else {
        visitor->in_flight += (uint64_t)sent;
        in_flight += (uint64_t)sent;
    }
    return sent;
}

static void fill_window(struct visitor *visitor)
{
    for (;;) {
        uint64_t room = (uint64_t)options.window - visitor->in_flight;
        int count = room < BATCH ? (int)room : BATCH;
        if (count == 0 || send_some(visitor, count) < count)
            return; /* the next tick tries again */
    }
}

/* Wait for answers, at most until then; count them, and let each release the next if wanted. */
static void collect(int64_t until, bool is_refilled)
{
    struct epoll_event ready[EVENTS];
    int64_t left = until - now();
    int timeout = left > 0 ? (int)(left / 1000000 + 1) : 0;
    if (left > 0 && !is_refilled) { /* epoll_wait knows only milliseconds */
        struct pollfd self = {poller, POLLIN, 0};
        ppoll(&self, 1, &(struct timespec){left / SECOND, left % SECOND}, NULL);
        timeout = 0;
    }
    calls.waits++;
    int count = epoll_wait(poller, ready, EVENTS, timeout);
    for (int i = 0; i < count; i++) {
        struct visitor *visitor = ready[i].data.ptr;
        int came, turns = 0;
        do {
            came = receive(visitor->fd, incoming, MSG_DONTWAIT);
            int64_t time = now();
            for (int j = 0; j < came; j++)
                account(visitor, &incoming->heads[j], time);
            if (is_refilled)
                fill_window(visitor);
        } while (came == BATCH && ++turns < TURNS && !is_refilled);
    }
}

static void end_warmup(void)
{
    for (uint32_t i = 0; i < visitor_count; i++)
        visitors[i].measured = visitors[i].next;
    current = &measured;
}

/* Keep every window full until then. */
static void push_window(int64_t end)
{
    int64_t tick = 0, time;
    while ((time = now()) < end && !is_stopped) {
        if (time >= tick) {
            for (uint32_t i = 0; i < visitor_count; i++) {
                expire(&visitors[i], time);
                fill_window(&visitors[i]);
            }
            tick = time + TICK;
        }
        collect(tick < end ? tick : end, true);
    }
}

/* Send what the clock allows until then: a token bucket as deep as 1 ms, and one. */
static void push_rate(int64_t end)
{
    static uint32_t turn; /* whose turn it is */
    double depth = options.rate / 1000 + 1, tokens = 1;
    double batch = options.rate / 2000 > 1 ? options.rate / 2000 : 1; /* half a bucket */
    int64_t last = now(), tick = last + TICK;
    for (;;) {
        int64_t time = now();
        bool is_over = time >= end || is_stopped;
        time = time < end ? time : end;
        tokens += (double)(time - last) * options.rate / 1e9;
        last = time;
        if (tokens > depth) {
            uint64_t spilt = (uint64_t)(tokens - depth);
            current->skipped += spilt;
            tokens -= (double)spilt;
        }
        if (is_over)
            return;
        int due = tokens >= batch ? (int)tokens : 0;
        int share = (due + (int)visitor_count - 1) / (int)visitor_count;
        tokens -= due;
        for (int count; due > 0; due -= count, turn = (turn + 1) % visitor_count) {
            count = share < due ? share : due;
            count = count < BATCH ? count : BATCH;
            int sent = send_some(&visitors[turn], count);
            current->skipped += (uint64_t)(count - sent);
        }
        if (time >= tick) {
            expire_all(time);
            tick = time + TICK;
        }
        int64_t next = last + (int64_t)((batch - tokens) * 1e9 / options.rate) + 1;
        next = next < tick ? next : tick;
        collect(next < end ? next : end, false);
    }
}

/* Hear out what is in flight, and for a moment those that come twice. */
static void drain(void)
{
    int64_t start = now(), end = start + LIMIT;
    while (in_flight > 0 && now() < end)
        collect(end < now() + TICK ? end : now() + TICK, false);
    expire_all(INT64_MAX);
    for (end = now() + LINGER; !options.one_way && now() < end;)
        collect(end, false);
}

static void print_answers(void)
{
    const struct counts *m = &measured;
    printf("\"received\": %" PRIu64 ", \"echoed\": %" PRIu64 ", \"lost\": %" PRIu64
           ", \"loss\": %.9f, \"late\": %" PRIu64 ", \"reordered\": %" PRIu64
           ", \"duplicates\": %" PRIu64 ", \"corrupt\": %" PRIu64 ", \"strays\": %" PRIu64 ", ",
           m->echoed + m->late + m->duplicates + m->corrupt + m->strays, m->echoed, m->lost,
           ratio((double)m->lost, (double)m->sent), m->late, m->reordered, m->duplicates,
           m->corrupt, m->strays);
    printf("\"rtt_mean_us\": %.3f, \"rtt_p50_us\": %.3f, \"rtt_p99_us\": %.3f, "
           "\"rtt_max_us\": %.3f, \"echoed_in_all\": %" PRIu64 ", ",
           ratio(rtt.sum, (double)rtt.count) / 1e3, rtt_at(0.5), rtt_at(0.99),
           (double)rtt.largest / 1e3, m->echoed + warmup.echoed);
}

static void print_load(double seconds)
{
    uint64_t drops = 0;
    for (uint32_t i = 0; i < visitor_count; i++)
        drops += drops_of(visitors[i].fd);
    printf("{\"mode\": \"%s\", \"size\": %zu, \"visitors\": %" PRIu32 ", ", options.mode_name,
           datagram_size, visitor_count);
    if (options.mode == WINDOW)
        printf("\"window\": %.0f, \"in_flight\": %.0f, ", options.window,
               options.window * options.visitors);
    else
        printf("\"rate\": %.0f, \"one_way\": %s, \"skipped\": %" PRIu64 ", ", options.rate,
               options.one_way ? "true" : "false", measured.skipped);
    double passed = (double)(options.one_way ? measured.sent : measured.echoed);
    printf("\"seconds\": %.6f, \"datagrams_per_s\": %.1f, \"bytes_per_s\": %.1f, "
           "\"sent\": %" PRIu64 ", \"sent_in_all\": %" PRIu64 ", ",
           seconds, ratio(passed, seconds), ratio(passed * (double)datagram_size, seconds),
           measured.sent, measured.sent + warmup.sent);
    if (!options.one_way)
        print_answers();
    print_costs(drops);
}

static int run_load(void)
{
    void (*push)(int64_t) = options.mode == WINDOW ? push_window : push_rate;
    prctl(PR_SET_TIMERSLACK, 1000); /* nanoseconds; the default of 50000 is long for a batch */
    open_visitors();
    push(now() + (int64_t)(options.warmup * 1e9));
    end_warmup();
    int64_t start = now();
    push(start + (int64_t)(options.seconds * 1e9));
    double seconds = (double)(now() - start) / 1e9;
    drain();
    print_load(seconds);
    return 0;
}

/* --- the command line ---------------------------------------------------------------------- */

static const struct option {
    const char *name;
    double *value;
    double least, most;
    bool is_whole, is_needed;
    int modes;
} table[] = {
    {"--size", &options.size, HEADER, LARGEST, true, true, WINDOW | RATE},
    {"--window", &options.window, 1, WINDOW_MOST, true, true, WINDOW},
    {"--rate", &options.rate, 1, 1e8, true, true, RATE},
    {"--visitors", &options.visitors, 1, VISITORS_MOST, true, true, WINDOW | RATE},
    {"--seconds", &options.seconds, 0.001, 86400, false, true, WINDOW | RATE},
    {"--warmup", &options.warmup, 0, 86400, false, false, WINDOW | RATE},
};
enum { TABLE = sizeof table / sizeof table[0] };

static void set_option(const struct option *option, const char *text)
{
    char *end;
    if (text == NULL)
        die(2, "%s: there is no value after it", option->name);
    double value = strtod(text, &end);
    bool is_number = end != text && *end == 0 && strspn(text, "0123456789.") == strlen(text);
    if (!is_number || (option->is_whole && strchr(text, '.') != NULL) || value < option->least
        || value > option->most)
        die(2, "%s %s: is not a %snumber from %.10g to %.10g%s", option->name, text,
            option->is_whole ? "whole " : "", option->least, option->most,
            option->value == &options.size ? " (the header alone takes 24 bytes)" : "");
    *option->value = value;
}

static void set_mode(const char *name)
{
    static const char *const names[] = {"echo", "sink", "window", "rate"};
    for (int i = 0; i < 4; i++)
        if (strcmp(name, names[i]) == 0) {
            options.mode = (enum mode)(1 << i);
            options.mode_name = names[i];
            return;
        }
    die(2, "%s: is none of echo, sink, window, rate", name);
}

static void read_options(char **words)
{
    if (*words == NULL)
        die(2, "what to do? echo, sink, window or rate; --help says more");
    set_mode(*words++);
    options.warmup = -1;
    for (; *words != NULL; words++) {
        const struct option *found = NULL;
        for (int i = 0; i < TABLE; i++)
            if (strcmp(*words, table[i].name) == 0 && table[i].modes & (int)options.mode)
                found = &table[i];
        if (found != NULL)
            set_option(found, *++words);
        else if (strcmp(*words, "--one-way") == 0 && options.mode == RATE)
            options.one_way = true;
        else if (**words == '-')
            die(2, "%s: is no option of %s", *words, options.mode_name);
        else if (options.address != NULL)
            die(2, "%s: there is one address already", *words);
        else
            options.address = *words;
        if (*words == NULL)
            break;
    }
    if (options.address == NULL)
        die(2, "%s wants an address, HOST:PORT", options.mode_name);
    for (int i = 0; i < TABLE; i++)
        if (table[i].is_needed && table[i].modes & (int)options.mode && *table[i].value == 0)
            die(2, "%s wants %s", options.mode_name, table[i].name);
    if (options.one_way && options.warmup >= 0)
        die(2, "--warmup: with --one-way the sink could not tell the two apart");
    options.warmup = options.warmup > 0 ? options.warmup : 0;
}

static void stop(int number)
{
    (void)number;
    is_stopped = 1;
}

int main(int count, char **words)
{
    for (int i = 1; i < count; i++)
        if (strcmp(words[i], "--help") == 0 || strcmp(words[i], "-h") == 0) {
            fputs(usage, stdout);
            return 0;
        }
    read_options(words + 1);
    struct sigaction action = {.sa_handler = stop};
    sigaction(SIGTERM, &action, NULL);
    sigaction(SIGINT, &action, NULL);
    switch (options.mode) {
    case ECHO:
        return run_echo();
    case SINK:
        return run_sink();
    default:
        return run_load();
    }
}
