// A parallel region of one thread as the plain call that it is. libgomp makes a team for it: 0.4 us in a
// loop, 2.6 us in a training step, whose other code leaves nothing of it in the caches (Zen 4). A step of a
// small layer has several. The linker hands GOMP_parallel here (setup.py: --wrap).
#if defined(__linux__)
#include <omp.h>

extern "C" {

void __real_GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags);

void __wrap_GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags) {
  // inside somebody's region the body would take that team's numbers for its own
  if (threads == 1 && omp_get_level() == 0) return body(data);
  __real_GOMP_parallel(body, data, threads, flags);
}

}  // extern "C"
#endif
