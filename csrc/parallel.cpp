#include "parallel.h"

#include <dlfcn.h>

#include <atomic>
#include <vector>

#if defined(__linux__)
#include <link.h>
#endif

namespace relprop {
namespace {

// What gcc emits for "#pragma omp parallel"; LLVM's and Intel's runtimes export it too. It runs function(data) once on
// each thread of a team of at most num_threads.
using GompParallel = void (*)(void (*function)(void*), void* data, unsigned num_threads, unsigned flags);

std::atomic<GompParallel> gomp_parallel{nullptr};

std::string base_name(const std::string& path) { return path.substr(path.rfind('/') + 1); }

#if defined(__linux__)
int collect_openmp(dl_phdr_info* info, size_t, void* data) {
  const std::string path = info->dlpi_name == nullptr ? "" : info->dlpi_name;
  const std::string name = base_name(path);
  for (const char* known : {"libgomp", "libiomp", "libomp"}) {
    if (name.rfind(known, 0) == 0) {
      static_cast<std::vector<std::string>*>(data)->push_back(path);
      break;
    }
  }
  return 0;
}

GompParallel find_in_loaded_objects() {
  std::vector<std::string> paths;
  dl_iterate_phdr(collect_openmp, &paths);
  // Other packages may have brought a private copy; torch's own pool is the one to share.
  std::stable_sort(paths.begin(), paths.end(), [](const std::string& a, const std::string& b) {
    return (a.find("/torch/") != std::string::npos) > (b.find("/torch/") != std::string::npos);
  });
  for (const std::string& path : paths) {
    void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_NOLOAD);  // kept: the runtime must outlive every call
    if (handle == nullptr) continue;
    if (void* symbol = dlsym(handle, "GOMP_parallel")) return reinterpret_cast<GompParallel>(symbol);
    dlclose(handle);
  }
  return nullptr;
}
#else
GompParallel find_in_loaded_objects() { return nullptr; }
#endif

// Only success is remembered: torch may be imported after this module.
GompParallel find_gomp_parallel() {
  GompParallel found = gomp_parallel.load(std::memory_order_acquire);
  if (found != nullptr) return found;
  found = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  if (found == nullptr) found = find_in_loaded_objects();
  gomp_parallel.store(found, std::memory_order_release);
  return found;
}

struct Team {
  RangeFunction run;
  const void* kernel;
  int64_t size;
  int64_t piece;
  int64_t pieces;
  std::atomic<int64_t> next{0};
};

// Each thread takes the next piece until none is left, so a team smaller than asked for does all the work too.
void work(void* data) {
  Team& team = *static_cast<Team*>(data);
  for (int64_t i = team.next.fetch_add(1); i < team.pieces; i = team.next.fetch_add(1)) {
    const int64_t begin = i * team.piece;
    team.run(team.kernel, begin, std::min(begin + team.piece, team.size));
  }
}

}  // namespace

std::string openmp_runtime() {
  const GompParallel found = find_gomp_parallel();
  Dl_info info;
  if (found == nullptr || dladdr(reinterpret_cast<void*>(found), &info) == 0 || info.dli_fname == nullptr) return "";
  return base_name(info.dli_fname);
}

void run_pieces(RangeFunction run, const void* kernel, int64_t size, int64_t piece, int threads) {
  Team team{run, kernel, size, piece, (size + piece - 1) / piece};
  const GompParallel parallel = team.pieces > 1 ? find_gomp_parallel() : nullptr;
  if (parallel == nullptr) {
    work(&team);
    return;
  }
  // Always the whole team, however few the pieces: libgomp ends and restarts threads when team sizes vary.
  parallel(work, &team, static_cast<unsigned>(threads), 0);
}

}  // namespace relprop
