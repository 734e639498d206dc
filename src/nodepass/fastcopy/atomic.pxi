# Every atomic access of the engine, with its memory order in the name, and the two
# invariant macros. No fences: ThreadSanitizer does not model them.

cdef extern from *:
    """
    #include <stdint.h>
    #include <stdio.h>
    #include <stdlib.h>

    static inline uint32_t np_load_relaxed32(uint32_t *p) {
        return __atomic_load_n(p, __ATOMIC_RELAXED);
    }
    static inline void np_store_relaxed32(uint32_t *p, uint32_t value) {
        __atomic_store_n(p, value, __ATOMIC_RELAXED);
    }
    static inline uint32_t np_load_acquire32(uint32_t *p) {
        return __atomic_load_n(p, __ATOMIC_ACQUIRE);
    }
    static inline void np_publish_release32(uint32_t *p, uint32_t value) {
        __atomic_store_n(p, value, __ATOMIC_RELEASE);
    }
    static inline uint32_t np_exchange32(uint32_t *p, uint32_t value) {
        return __atomic_exchange_n(p, value, __ATOMIC_ACQ_REL);
    }
    static inline uint32_t np_or32(uint32_t *p, uint32_t bits) {
        return __atomic_fetch_or(p, bits, __ATOMIC_ACQ_REL);
    }
    static inline uint32_t np_subtract32(uint32_t *p, uint32_t value) {
        return __atomic_sub_fetch(p, value, __ATOMIC_ACQ_REL);
    }
    static inline uint64_t np_load_relaxed64(uint64_t *p) {
        return __atomic_load_n(p, __ATOMIC_RELAXED);
    }
    static inline uint64_t np_load_acquire64(uint64_t *p) {
        return __atomic_load_n(p, __ATOMIC_ACQUIRE);
    }
    static inline void np_publish_release64(uint64_t *p, uint64_t value) {
        __atomic_store_n(p, value, __ATOMIC_RELEASE);
    }
    /* One writer per counter: a plain add that readers can see whole; no locked cycle. */
    static inline void np_add_own64(uint64_t *p, uint64_t value) {
        uint64_t now = __atomic_load_n(p, __ATOMIC_RELAXED);
        __atomic_store_n(p, now + value, __ATOMIC_RELAXED);
    }

    #ifdef NODEPASS_DEBUG
    #define NP_DEBUG 1
    #else
    #define NP_DEBUG 0
    #endif

    /* A broken promise of our own: stop at once in a debug build, count in a release. */
    static inline int np_bug(int broken, uint64_t *counter, const char *what) {
        if (__builtin_expect(broken, 0)) {
            if (NP_DEBUG) {
                fprintf(stderr, "nodepass engine: broken invariant: %s\\n", what);
                abort();
            }
            np_add_own64(counter, 1);
        }
        return broken;
    }
    """
    uint32_t load_relaxed32 "np_load_relaxed32"(uint32_t* p) noexcept nogil
    void store_relaxed32 "np_store_relaxed32"(uint32_t* p, uint32_t value) noexcept nogil
    uint32_t load_acquire32 "np_load_acquire32"(uint32_t* p) noexcept nogil
    void publish_release32 "np_publish_release32"(uint32_t* p, uint32_t value) noexcept nogil
    uint32_t exchange32 "np_exchange32"(uint32_t* p, uint32_t value) noexcept nogil
    uint32_t or32 "np_or32"(uint32_t* p, uint32_t bits) noexcept nogil
    uint32_t subtract32 "np_subtract32"(uint32_t* p, uint32_t value) noexcept nogil
    uint64_t load_relaxed64 "np_load_relaxed64"(uint64_t* p) noexcept nogil
    uint64_t load_acquire64 "np_load_acquire64"(uint64_t* p) noexcept nogil
    void publish_release64 "np_publish_release64"(uint64_t* p, uint64_t value) noexcept nogil
    void add_own64 "np_add_own64"(uint64_t* p, uint64_t value) noexcept nogil
    int NP_DEBUG
    bint NP_BUG "np_bug"(bint broken, uint64_t* counter, const char* what) noexcept nogil


# Decrement of a gauge by its one writer.
cdef inline void take_own64(uint64_t* p, uint64_t value) noexcept nogil:
    add_own64(p, -value)
