# The package alone: fields written in Julia and handed over as C function pointers, as Python's are.

using LinearAlgebra
using PyJLODE
using PyJLODE: AdjointRequest, Field, Functions, Lent, Outcome, Request, Source, adjoint!, algorithm, interpolate!, lend,
    Numbers, One, ReplayRequest, Replayed, Start, Systems, replay!, source_function, structure
using Random: Xoshiro
using SciMLSensitivity
using Test

# JLArrays.jl is in the package's own test environment, and may not be in that of a caller.
const AS_ON_DEVICES = Base.find_package("JLArrays") !== nothing
if AS_ON_DEVICES
    include("jlarrays.jl")
else
    @info "Without JLArrays.jl nothing of what is done on devices is tested."
end

# The harmonic oscillator with a friction that is a parameter: u'' = -u - p u'.
const FRICTION = Ref(0.1)

function oscillator(du::Ptr{T}, u::Ptr{T}, t::Cdouble) where {T}
    x, v = unsafe_load(u, 1), unsafe_load(u, 2)
    unsafe_store!(du, v, 1)
    unsafe_store!(du, -x - T(FRICTION[]) * v, 2)
    return PyJLODE.done!()
end

function jacobian(J::Ptr{T}, u::Ptr{T}, t::Cdouble) where {T}
    for (i, value) in enumerate((0, -1, 1, -FRICTION[]))  # column by column
        unsafe_store!(J, T(value), i)
    end
    return PyJLODE.done!()
end

no_time(dT::Ptr{T}, u::Ptr{T}, t::Cdouble) where {T} = (unsafe_store!(dT, zero(T), 1); unsafe_store!(dT, zero(T), 2); PyJLODE.done!())

function product(out::Ptr{T}, v::Ptr{T}, u::Ptr{T}, t::Cdouble) where {T}
    a, b = unsafe_load(v, 1), unsafe_load(v, 2)
    unsafe_store!(out, -b, 1)
    unsafe_store!(out, a - T(FRICTION[]) * b, 2)
    return PyJLODE.done!()
end

function parameter_product(out::Ptr{T}, v::Ptr{T}, u::Ptr{T}, t::Cdouble) where {T}
    unsafe_store!(out, -unsafe_load(v, 2) * unsafe_load(u, 2))
    return PyJLODE.done!()
end

function height(margin::Ptr{Cdouble}, u::Ptr{T}, t::Cdouble) where {T}
    unsafe_store!(margin, Cdouble(unsafe_load(u, 1)))
    return PyJLODE.done!()
end

failing(du::Ptr{T}, u::Ptr{T}, t::Cdouble) where {T} = t > 0.5 ? nothing : PyJLODE.done!()

"C function pointers of the above; each must be written out, since @cfunction wants its types literally."
pointers(::Type{Float64}) = (
    f = @cfunction(oscillator, Cvoid, (Ptr{Float64}, Ptr{Float64}, Cdouble)),
    jac = @cfunction(jacobian, Cvoid, (Ptr{Float64}, Ptr{Float64}, Cdouble)),
    tgrad = @cfunction(no_time, Cvoid, (Ptr{Float64}, Ptr{Float64}, Cdouble)),
    vjp = @cfunction(product, Cvoid, (Ptr{Float64}, Ptr{Float64}, Ptr{Float64}, Cdouble)),
    vjp_p = @cfunction(parameter_product, Cvoid, (Ptr{Float64}, Ptr{Float64}, Ptr{Float64}, Cdouble)),
    event = @cfunction(height, Cvoid, (Ptr{Cdouble}, Ptr{Float64}, Cdouble)),
)
pointers(::Type{Float32}) = (
    f = @cfunction(oscillator, Cvoid, (Ptr{Float32}, Ptr{Float32}, Cdouble)),
    jac = @cfunction(jacobian, Cvoid, (Ptr{Float32}, Ptr{Float32}, Cdouble)),
    tgrad = @cfunction(no_time, Cvoid, (Ptr{Float32}, Ptr{Float32}, Cdouble)),
    vjp = @cfunction(product, Cvoid, (Ptr{Float32}, Ptr{Float32}, Ptr{Float32}, Cdouble)),
    vjp_p = @cfunction(parameter_product, Cvoid, (Ptr{Float32}, Ptr{Float32}, Ptr{Float32}, Cdouble)),
    event = @cfunction(height, Cvoid, (Ptr{Cdouble}, Ptr{Float32}, Cdouble)),
)

matrix() = [0 1; -1 -FRICTION[]]
exact(t, u0 = [1.0, 0.5]) = exp(matrix() * t) * u0
address(a::Array) = Int64(UInt(pointer(a)))

"Solve from (1, 1/2)."
function run(field, text, times; T = Float64, rtol = 1.0e-6, first_step = 0.0, fixed = false, dense = false, keep = false, full = false, control = (;))
    u0, out, times = T[1, 0.5], zeros(T, 2, length(times)), collect(Float64, times)
    offsets, tol = [0, 2], [rtol]
    owner = (; u0, out, times, offsets, tol)
    GC.@preserve owner begin
        r = structure(
            Request; u0, out, times, offsets, rtol = tol, atol = tol, first_step, fixed, dense, keep, full, max_step = Inf,
            max_steps = 100_000, control...
        )
        s, outcome = PyJLODE.solve(field, algorithm(text), r)
    end
    return (; s, outcome, code = unsafe_string(outcome.code), out, u0)
end

function run(::Type{T}, text, times; names = (:f,), kwargs...) where {T}
    chosen = NamedTuple{names}(pointers(T))
    return run(Field{T}(2; chosen..., parameters = :vjp_p in names ? 1 : 0), text, times; T, kwargs...)
end

"The gradients with cotangents `g`."
function adjoint(s, name, text, times, g::Array{T}; rtol, max_steps = 100_000) where {T}
    du0, dp, times, tol = zeros(T, 2), zeros(T, 1), collect(Float64, times), [rtol]
    GC.@preserve du0 dp times tol g begin
        r = structure(
            AdjointRequest; du0, dp, g, times, rtol = tol, atol = tol, max_step = Inf, max_steps
        )
        outcome = adjoint!(s, name, algorithm(text), r)
        @test unsafe_string(outcome.code) == (max_steps == 100_000 ? "Success" : "MaxIters")
    end
    return du0, dp
end

# x' = z, 0 = z + p x²: the parameter is in the algebraic equation alone, and x = 1 / (1 / x0 + p t).
const RATE = Ref(0.7)

function decay(du::Ptr{Float64}, u::Ptr{Float64}, t::Cdouble)
    x, z = unsafe_load(u, 1), unsafe_load(u, 2)
    unsafe_store!(du, z, 1)
    unsafe_store!(du, z + RATE[] * x^2, 2)
    return PyJLODE.done!()
end

function decay_jacobian(J::Ptr{Float64}, u::Ptr{Float64}, t::Cdouble)
    for (i, value) in enumerate((0.0, 2RATE[] * unsafe_load(u, 1), 1.0, 1.0))
        unsafe_store!(J, value, i)
    end
    return PyJLODE.done!()
end

function decay_product(out::Ptr{Float64}, v::Ptr{Float64}, u::Ptr{Float64}, t::Cdouble)
    a, b = unsafe_load(v, 1), unsafe_load(v, 2)
    unsafe_store!(out, 2RATE[] * unsafe_load(u, 1) * b, 1)
    unsafe_store!(out, a + b, 2)
    return PyJLODE.done!()
end

function decay_by_rate(out::Ptr{Float64}, v::Ptr{Float64}, u::Ptr{Float64}, t::Cdouble)
    unsafe_store!(out, unsafe_load(v, 2) * unsafe_load(u, 1)^2)
    return PyJLODE.done!()
end

"The gradients of x + 2 z at the output times after the first, the last of which is in a solve of a DAE."
function mass_adjoint(text, times; back = text)
    field = Field{Float64}(
        2; f = @cfunction(decay, Cvoid, (Ptr{Float64}, Ptr{Float64}, Cdouble)),
        jac = @cfunction(decay_jacobian, Cvoid, (Ptr{Float64}, Ptr{Float64}, Cdouble)),
        tgrad = @cfunction(no_time, Cvoid, (Ptr{Float64}, Ptr{Float64}, Cdouble)),
        vjp = @cfunction(decay_product, Cvoid, (Ptr{Float64}, Ptr{Float64}, Ptr{Float64}, Cdouble)),
        vjp_p = @cfunction(decay_by_rate, Cvoid, (Ptr{Float64}, Ptr{Float64}, Ptr{Float64}, Cdouble)),
        parameters = 1
    )
    u0, out, times, tol, mass = [1.5, -RATE[] * 1.5^2], zeros(2, length(times)), collect(Float64, times), [1.0e-9], [1.0, 0, 0, 0]
    du0, dp, slopes = zeros(2), zeros(5), zeros(2, length(times))
    g = repeat([1.0, 2.0], 1, length(times))
    GC.@preserve u0 out times tol mass du0 dp slopes g begin
        r = structure(
            Request; u0, out, times, rtol = tol, atol = tol, mass, dense = true, max_step = Inf, max_steps = 100_000
        )
        s, _ = PyJLODE.solve(field, algorithm(text), r)
        a = structure(
            AdjointRequest; du0, dp, g, times, rtol = tol, atol = tol, slopes, max_step = Inf, max_steps = 100_000
        )
        @test PyJLODE.of_mass(s)
        outcome = PyJLODE.mass_adjoint!(s, algorithm(back), a)
        @test unsafe_string(outcome.code) == "Success"
    end
    return (; u0, out, times, du0, dp, slopes)
end

# Compiled functions by their addresses, of what they read nothing but v, u and the time.
function call_packed(f, out::Array{T}, v::Vector{T}, u::Vector{T}, t::Vector{T}) where {T}
    GC.@preserve out v u t begin
        p = pointer(u)
        @ccall $f(
            pointer(out)::Ptr{T}, pointer(v)::Ptr{T}, p::Ptr{T}, p::Ptr{T}, p::Ptr{T}, p::Ptr{T}, pointer(t)::Ptr{T}
        )::Cvoid
    end
    return nothing
end

function call_single(f, out::Array{T}, v::Vector{T}, u::Vector{T}, t::T) where {T}
    GC.@preserve out v u begin
        p = pointer(u)
        @ccall $f(
            pointer(out)::Ptr{T}, pointer(v)::Ptr{T}, p::Ptr{T}, p::Ptr{T}, p::Ptr{T}, p::Ptr{T}, t::Cdouble
        )::Cvoid
    end
    return nothing
end

@testset "PyJLODE" begin
    @testset "lent memory is the memory itself" begin
        a = [1.0, 2.0, 3.0]
        b = Vector{Float64}(lend(a))
        @test pointer(b) == pointer(a)
        b[2] = 5
        @test a[2] == 5
        @test isempty(Vector{Float64}(Lent(C_NULL, 0)))
    end

    @testset "the layouts are those of C" begin
        @test sizeof(Request) == 13 * 16 + 16 * 8
        @test sizeof(ReplayRequest) == 7 * 16 + 2 * 8
        @test sizeof(Replayed) == 16
        @test sizeof(AdjointRequest) == 9 * 16 + 9 * 8
        @test sizeof(Functions) == 12 * 8
        @test sizeof(Outcome) == 12 * 8
        @test sizeof(Systems) == 8 + 3 * 16
    end

    @testset "products of matrices of all sizes and forms, $T" for T in (Float32, Float64)
        rng = Xoshiro(0)
        sizes = [ntuple(_ -> rand(rng, 1:21), 3) for _ in 1:300]
        append!(sizes, [(3, 5, 0), (50, 50, 50), (40, 61, 7), (1, 1030, 1030), (103, 102, 101)])
        for (m, n, k) in sizes, small in (false, true)
            small && rand(rng) > 0.07 && continue  # of each is code made
            A, B = rand(rng, T, m, k) .- T(0.5), rand(rng, T, k, n) .- T(0.5)
            # Each in rows or in columns; and what it is added to: nothing, a row, a column, a matrix, or what is there.
            (a, a1, a2), (b, b1, b2) = ((rand(rng, Bool) ? (vec(X), 1, size(X, 1)) : (vec(permutedims(X)), size(X, 2), 1)) for X in (A, B))
            kind = rand(rng, (:none, :row, :column, :matrix, :there))
            S = kind == :none ? zeros(T, m, n) : rand(rng, T, m, n)
            kind == :row && (S .= S[1:1, :])
            kind == :column && (S .= S[:, 1:1])
            s = vec(permutedims(S))
            out = [kind == :there ? s : fill(T(NaN), m * n); T(7)]
            GC.@preserve a b s out begin
                from = Numbers(pointer(kind == :there ? out : s))
                start = kind == :none ? nothing : kind == :column ? Start(from, n, 0) : Start(from, kind == :row ? 0 : n, One())
                to, x, y = Numbers(pointer(out)), Numbers(pointer(a)), Numbers(pointer(b))
                if small
                    PyJLODE.small!(to, Val((m, n, k)), x, Val((a1, a2)), y, Val((b1, b2)), start)
                else
                    PyJLODE.multiply!(to, m, n, k, x, a1, a2, y, b1, b2, start)
                end
            end
            @test permutedims(reshape(out[1:(end - 1)], n, m)) ≈ S + A * B atol = 30 * eps(T) * sqrt(k + 1)
            @test out[end] == 7  # nothing is written beside it
        end
    end

    @testset "a replay is the adjoint of the steps, $T, to $last" for T in (Float32, Float64), last in (2.0, -2.0)
        times = [0.0, last / 2, last]
        r = run(T, "Midpoint()", times; names = (:f, :vjp, :vjp_p), fixed = true, first_step = 0.25, keep = true)
        @test length(r.s.steps.times) == 9
        g, du0, dp = T[0 1 -1; 0 2 0.5], zeros(T, 2), zeros(T, 1)
        a, c, p = [0.0 0.5 0; 0 0 1; 0 0 0], [0, 0.5, 1], [0.0 1 0]
        GC.@preserve times g du0 dp a c p begin
            replayed = replay!(r.s, structure(ReplayRequest; du0, dp, g, times, a = vec(a), c, p = vec(p), stages = 2))
        end
        @test replayed.nf == 16
        @test replayed.apart < 10 * eps(T)
        dt = last / 8
        step(p) = (M = [0 1; -1 -p]; I + dt * M + dt^2 / 2 * M^2)
        of_steps(u0, p) = sum(g[:, 2] .* (step(p)^4 * u0)) + sum(g[:, 3] .* (step(p)^8 * u0))
        @test du0 ≈ transpose(step(0.1)^4) * g[:, 2] + transpose(step(0.1)^8) * g[:, 3]
        h = 1.0e-6
        @test only(dp) ≈ (of_steps([1, 0.5], 0.1 + h) - of_steps([1, 0.5], 0.1 - h)) / 2h rtol = sqrt(eps(T)) / 10
    end

    @testset "a replay from some of the states is that from all, of $steps steps" for steps in (1, 3, 40, 1000)
        times, a, c, p = [0.0, 0.7, 2.0], [0.0 0.5 0; 0 0 1; 0 0 0], [0, 0.5, 1], [0.0 1 0]
        runs = [
            run(Float64, "Midpoint()", times; names = (:f, :vjp, :vjp_p), fixed = true, first_step = 2 / steps, keep) for
                keep in (1, 2)
        ]
        function gradient(r)
            g, du0, dp = [0 1 -1; 0 2 0.5], zeros(2), zeros(1)
            GC.@preserve times g du0 dp a c p begin
                r = replay!(r.s, structure(ReplayRequest; du0, dp, g, times, a = vec(a), c, p = vec(p), stages = 2))
            end
            return [du0; dp], r
        end
        (from_all, whole), (found, some) = gradient.(runs)
        @test found ≈ from_all rtol = 1.0e-12
        @test gradient(runs[2])[1] == found
        (; points) = runs[2].s.steps
        @test length(points.points) <= PyJLODE.slots(steps)
        @test isempty(runs[2].s.steps.states)
        @test whole.nf <= some.nf <= 3whole.nf
    end

    @testset "a field of two parts, $name, to $last" for name in ("KenCarp4", "KenCarp5"), last in (1.0, -1.0)
        text = "$name(smooth_est = false, nlsolve = OrdinaryDiffEqSDIRK.NLNewton(new_W_dt_cutoff = 0 // 1))"
        # Each is the oscillator, and both are that at twice the speed.
        part() = Field{Float64}(2; pointers(Float64)..., event = 0, parameters = 1)
        times = [0.0, 0.3 * last, last]
        parts = PyJLODE.Parts(part(), part())
        r = run(parts, text, times; rtol = 1.0e-8, keep = true, dense = true)
        @test r.code == "Success"
        @test r.out[:, 3] ≈ exact(2last) rtol = 1.0e-6
        between = zeros(2)
        at = [0.5 * last]
        GC.@preserve between at interpolate!(r.s, address(at), address(between), 1)
        @test between ≈ exact(last) rtol = 1.0e-3
        (; OrdinaryDiffEqSDIRK) = PyJLODE.Names
        make = getproperty(OrdinaryDiffEqSDIRK, Symbol(name, :ESDIRKIMEXTableau))
        tab = make(Float64, Float64)
        a, c = [vec(permutedims(tab.Ai)); vec(permutedims(tab.Ae))], tab.c
        g, du0, dp = [0 1 -1; 0 2 0.5], zeros(2), zeros(2)
        GC.@preserve times g du0 dp a c begin
            replayed = replay!(r.s, structure(ReplayRequest; du0, dp, g, times, a, c, stages = tab.s))
        end
        @test replayed.apart < 1.0e-8
        of_output(k, p) = sum(g[:, k] .* (exp([0 1; -1 -p] * 2times[k]) * [1, 0.5]))
        of_solution(p) = of_output(2, p) + of_output(3, p)
        @test du0 ≈ sum(exp(transpose(matrix()) * 2times[k]) * g[:, k] for k in 2:3) rtol = 1.0e-4
        h = 1.0e-5
        @test sum(dp) ≈ (of_solution(0.1 + h) - of_solution(0.1 - h)) / 2h rtol = 1.0e-4
    end

    @testset "systems of a sweep end where each would" begin
        states, alone = PyJLODE.sweep_linear("Tsit5()")
        @test all(abs.(states .- [1, 1, exp(-1), exp(-1)]) .< 1.0e-4)
        @test alone == states[[1, 3]]
    end

    @testset "systems abreast, $T, implicit=$implicit: ends, gradient, dense output and events" for T in (Float32, Float64),
            implicit in (false, true)

        near = implicit ? 0.1 : 1.0e-3  # the implicit method is of order 1
        (; out, du0, inside) = PyJLODE.abreast_linear(T; implicit)
        @test out ≈ [fill(1.0, 10); fill(exp(-0.5), 10); fill(exp(-1.0), 10)] rtol = near
        # The steps are linear in the start, so the gradient by it is the sum of the states themselves.
        @test du0 ≈ out[11:20] .+ out[21:30] rtol = 1.0e3 * eps(T)
        @test inside ≈ fill(exp(-0.25), 10) rtol = near
        @test out == PyJLODE.abreast_linear(T; implicit, tolerances = 10).out  # one for each number of each system
        (; out, du0, event_times) = PyJLODE.abreast_linear(T; implicit, ends = true)
        @test event_times ≈ fill(-log(0.7), 10) rtol = near
        @test out[11:20] ≈ fill(0.7, 10) rtol = 10 * eps(T)
        @test du0 ≈ out[11:20] rtol = 1.0e3 * eps(T)
    end

    @testset "the steps that a sweep kept are room for the next one's" begin
        foreach(_ -> PyJLODE.abreast_linear(Float64), 1:2)
        before = PyJLODE.SPARE_BYTES[]
        @test before == sum(chunks -> sum(PyJLODE.bytes, chunks), values(PyJLODE.SPARE))
        PyJLODE.abreast_linear(Float64)
        @test PyJLODE.SPARE_BYTES[] == before
    end

    @testset "a system with the transposed matrix, each lane with its own exchange of rows, n = $n" for n in (1, 2, 5)
        A = randn(n, n, PyJLODE.WIDTH)
        x = randn(n, PyJLODE.WIDTH)
        flat(x) = vec(permutedims(x, (ndims(x), 1:(ndims(x) - 1)...)))
        a, swapped, y = flat(A), zeros(n * n * PyJLODE.WIDTH), flat(x)
        GC.@preserve a swapped y begin
            PyJLODE.factorise!(PyJLODE.numbers(a), PyJLODE.numbers(swapped), PyJLODE.Pack{Float64}(2.0), n)
            PyJLODE.solve_transposed!(PyJLODE.numbers(y), PyJLODE.numbers(a), PyJLODE.numbers(swapped), n)
        end
        for w in 1:PyJLODE.WIDTH
            W = 2.0 * (1:n .== (1:n)') - A[:, :, w]
            @test y[w:(PyJLODE.WIDTH):end] ≈ W' \ x[:, w]
        end
    end

    @testset "what eight systems compute is what each would, $T" for T in (Float32, Float64)
        special = T[0, -0.0, 1, -1, 0.5, -2.5, 3, Inf, -Inf, NaN, 1.0e-3, 20, -30, 2.5, 0.1, -0.7]
        two = (:atan2, :hypot, :max, :min, :fmax, :fmin, :fmod, :remainder, :xlogy, :copysign, :pow, :loop_atan2, :loop_pow)
        numbers = filter(!=(:isnan), PyJLODE.Elementary.NAMES)
        calls = [name in two ? "$name(u[1], v[1])" : "$name(u[1])" for name in numbers]
        formulas = [
            calls; "ifelse(isnan(u[1]), 1.0, v[1])"; "muladd(u[1], 2.0, v[1])"; "muladd(3.0, u[1], 1.0)"; "-u[1]";
            "u[1] - 1.0 / (2.0 + v[1] * v[1])"; "ifelse((u[1] <= 0.5) & !(v[1] == 1.0), u[1], 0.0)";
            "ifelse((u[1] != v[1]) | (1.0 < v[1]), 1.0, v[1])"; "ifelse(ifelse(u[1] < 0.0, v[1] < 0.0, true), t, u[1])";
            "ifelse((u[1] < 0.0) != (v[1] < 0.0), 1.0, 2.0)"; "ifelse(u[1] < v[1], t, pow(u[1], 3.0))"
        ]
        T == Float32 && (formulas = replace.(formulas, r"(\d+\.\d+)" => s"\1f0"))
        lines = ["out[$i] = $e" for (i, e) in enumerate(formulas)]
        text = "function f(out, v, u, p, c, w, t)\n$(join(lines, '\n'))\nreturn nothing\nend"
        packed, single = PyJLODE.compile_packed(T, text), PyJLODE.compile(T, text)
        out, want, t = zeros(T, 8, length(formulas)), zeros(T, length(formulas)), T.(1:8)
        same(x, y) = isequal(x, y) || isapprox(x, y; rtol = 8 * eps(T))
        for part in (1:8, 9:16), shift in 0:15
            u, v = special[part], circshift(special, shift)[part]
            call_packed(packed, out, v, u, t)
            for w in 1:8
                call_single(single, want, v[w:w], u[w:w], t[w])
                for i in eachindex(want)
                    same(out[w, i], want[i]) || @info "differs" formulas[i] u[w] v[w] out[w, i] want[i]
                    @test same(out[w, i], want[i])
                end
            end
        end
    end

    @testset "$text, $T, to $last" for text in ("DP5()", "Tsit5()", "BS3()", "DP8()", "Vern7()", "Vern9()"),
            T in (Float32, Float64), last in (3.0, -3.0)
        times = range(0, last, length = 7)
        r = run(T, text, times)
        @test r.code == "Success"
        @test eltype(r.out) == T
        @test maximum(abs, r.out .- reduce(hcat, exact.(times))) < 2.0e-4
        @test r.out[:, 1] == r.u0
    end

    @testset "$text with its Jacobian" for text in ("Rodas5P()", "Rosenbrock23()", "KenCarp4()", "Kvaerno5()", "TRBDF2()", "RadauIIA5()", "QNDF()")
        times = range(0, 3, length = 7)
        rtol = text in ("Rosenbrock23()", "TRBDF2()") ? 1.0e-4 : 1.0e-6
        r = run(Float64, text, times; names = (:f, :jac, :tgrad), rtol)
        @test r.code == "Success"
        @test maximum(abs, r.out .- reduce(hcat, exact.(times))) < 1.0e3 * rtol
        @test r.outcome.njac > 0
    end

    @testset "fully implicit, y' - f(t, y) = 0" begin
        times = range(0, 3, length = 7)
        r = run(Float64, "DFBDF()", times; names = (:f, :jac, :tgrad))
        @test r.code == "Success"
        @test maximum(abs, r.out .- reduce(hcat, exact.(times))) < 1.0e-3
        @test r.outcome.njac > 0
        r = run(Float64, "DFBDF()", [0.0, 1.0]; names = (:f, :jac, :tgrad, :event), rtol = 1.0e-8)
        @test r.code == "Terminated"
        @test abs(exact(r.outcome.event_time)[1]) < 1.0e-6
        text = "function f(du, u, p, t)\n du[1] = u[2]\n du[2] = -u[1] - p[1] * u[2]\n end"
        r = run(Source{Float64}(2, source_function(text), [0.1]), "DFBDF()", [0.0, 3.0]; rtol = 1.0e-8)
        @test r.out[:, 2] ≈ exact(3.0) rtol = 1.0e-5
    end

    @testset "fixed steps, and from time to time" begin
        times = [0.0, 1.0]
        errors = map((0.1, 0.05)) do step
            r = run(Float64, "RK4()", times; fixed = true, first_step = step)
            maximum(abs, r.out[:, 2] .- exact(1.0))
        end
        @test 3.7 < log2(errors[1] / errors[2]) < 4.3
        fine = run(Float64, "RK4()", range(0, 1, length = 21); fixed = true)
        coarse = run(Float64, "RK4()", times; fixed = true, first_step = 0.05)
        @test fine.out[:, end] ≈ coarse.out[:, end] rtol = 1.0e-12
    end

    @testset "the step control that is asked for" begin
        control = (; beta1 = 1 / 5, beta2 = 0.0, gamma = 0.9, qmin = 0.2, qmax = 10.0)
        own, asked, timid = map(((;), control, (; control..., gamma = 0.45))) do control
            run(Float64, "Tsit5()", [0.0, 20.0]; rtol = 1.0e-8, control).outcome.naccept
        end
        @test asked < 0.9 * own
        @test 1.8 < timid / asked < 2.2
    end

    @testset "event" begin
        r = run(Float64, "Tsit5()", [0.0, 1.0]; names = (:f, :event), rtol = 1.0e-9)
        time = r.outcome.event_time
        @test r.code == "Terminated"
        @test abs(exact(time)[1]) < 1.0e-7
        @test r.out[:, 2] ≈ exact(time) rtol = 1.0e-7
    end

    @testset "dense output" begin
        r = run(Float64, "Tsit5()", [0.0, 3.0]; dense = true, rtol = 1.0e-8)
        times, out = [0.3, 1.7, 2.9], zeros(2, 3)
        GC.@preserve times out interpolate!(r.s, address(times), address(out), 3)
        @test maximum(abs, out .- reduce(hcat, exact.(times))) < 1.0e-6
    end

    @testset "a callback that gives up" begin
        f = @cfunction(failing, Cvoid, (Ptr{Float64}, Ptr{Float64}, Cdouble))
        field = Field{Float64}(2; f)
        @test_throws PyJLODE.Abandoned run(field, "Tsit5()", [0.0, 1.0])
        @test run(Float64, "Tsit5()", [0.0, 1.0]).code == "Success"
    end

    @testset "arrays that a callback saw stay where they are" begin
        field = run(Float64, "Tsit5()", [0.0, 3.0]).s.field
        @test 0 < length(field.pinned) <= PyJLODE.PINNED
        GC.gc()
        @test allunique(pointer.(field.pinned))
    end

    @testset "failures are text, and what was let go of is gone" begin
        text = "NoSuchMethod()"
        GC.@preserve text begin
            @test PyJLODE.call_algorithm(Cstring(pointer(text))) == 0
            @test occursin("NoSuchMethod", unsafe_string(PyJLODE.call_failure()))
        end
        numbers = [PyJLODE.hold(:a), PyJLODE.hold(:b)]
        @test PyJLODE.HELD[numbers[2]] == :b
        GC.@preserve numbers PyJLODE.call_release(pointer(numbers), 2)
        @test isempty(PyJLODE.HELD)
        on = PyJLODE.call_collect(0)
        @test PyJLODE.call_collect(on) == 0
    end

    # L = sum of the squares of the states at the outputs; its gradient by differences in exact arithmetic of the flow.
    loss(times, u0) = sum(t -> sum(abs2, exact(t, u0)), times)
    @testset "adjoint $name, $T" for name in ("interpolating", "gauss", "quadrature", "backsolve"), T in (Float32, Float64)
        times = [0.0, 1.0, 2.0, 2.5]
        rtol = T == Float64 ? 1.0e-9 : 1.0e-5
        r = run(T, "Tsit5()", times; names = (:f, :vjp, :vjp_p), dense = true, rtol)
        du0, dp = adjoint(r.s, name, "Tsit5()", times, 2 .* r.out; rtol)
        h = 1.0e-5
        want = [
            (loss(times[2:end], [1.0, 0.5] .+ h .* e) - loss(times[2:end], [1.0, 0.5] .- h .* e)) / 2h for e in ([1, 0], [0, 1])
        ]
        at(p) = (FRICTION[] = p; value = loss(times[2:end], [1.0, 0.5]); FRICTION[] = 0.1; value)
        want_p = (at(0.1 + h) - at(0.1 - h)) / 2h
        @test du0 ≈ want rtol = 1.0e3 * rtol
        @test dp[1] ≈ want_p rtol = 1.0e3 * rtol
        adjoint(r.s, name, "Tsit5()", times, 2 .* r.out; rtol, max_steps = 3)
    end

    if AS_ON_DEVICES
        on_device(::Type{T}; names...) where {T} = Field{T}(
            structure(Functions; n = 2, parameters = haskey(names, :vjp_p) ? 1 : 0, kind = STAND_IN, names...)
        )
        @testset "as on a device: $text, $T" for text in ("Tsit5()", "DP5()", "DP8()", "BS3()", "Vern7()"), T in (Float32, Float64)
            times, rtol = [0.0, 0.3, 1.7, 2.0], T == Float64 ? 1.0e-9 : 1.0e-5
            r = run(on_device(T; pointers(T).f), text, times; T, rtol)
            @test r.code == "Success"
            @test r.out ≈ run(T, text, times; rtol).out rtol = 100eps(T)
            @test 1 < length(r.s.field.pinned) <= PyJLODE.PINNED  # the callbacks saw the solver's own arrays
        end
        @testset "as on a device: event, dense output" begin
            functions = pointers(Float64)
            r = run(on_device(Float64; functions.f, functions.event), "Tsit5()", [0.0, 10.0]; rtol = 1.0e-9)
            @test r.code == "Terminated"
            @test abs(r.out[1, 2]) < 1.0e-7
            r = run(on_device(Float64; functions.f), "Tsit5()", [0.0, 2.0]; rtol = 1.0e-9, dense = true)
            at, out = [0.3, 1.9], zeros(2, 2)
            GC.@preserve at out interpolate!(r.s, address(at), address(out), 2)
            @test out ≈ hcat(exact(0.3), exact(1.9)) rtol = 1.0e-6
        end
        @testset "as on a device: adjoint $name" for name in ("interpolating", "gauss", "quadrature", "backsolve")
            times, functions = [0.0, 1.0, 2.5], pointers(Float64)
            names = (; functions.f, functions.vjp, functions.vjp_p)
            there = run(on_device(Float64; names...), "Tsit5()", times; rtol = 1.0e-9, dense = true)
            here = run(Float64, "Tsit5()", times; names = keys(names), rtol = 1.0e-9, dense = true)
            gradients = map(r -> adjoint(r.s, name, "Tsit5()", times, 2 .* r.out; rtol = 1.0e-9), (there, here))
            @test all(isapprox.(gradients...; rtol = 1.0e-9))
        end
    end

    @testset "the adjoint of a DAE: $text, to $last" for text in ("Rodas5P()", "RadauIIA5()", "DFBDF()"), last in (2.0, -0.5)
        # DFBDF solves it as F(t, y, y') = 0, which the adjoint is not.
        back = text == "DFBDF()" ? "Rodas5P()" : text
        (; out, times, du0, dp, slopes) = mass_adjoint(text, range(0, last; length = 4); back)
        p, x0 = RATE[], 1.5
        x = @. 1 / (1 / x0 + p * times)
        @test out ≈ [x (-p .* x .^ 2)]' rtol = 1.0e-6
        @test slopes ≈ [(-p .* x .^ 2) (2p^2 .* x .^ 3)]' rtol = 1.0e-6
        # Of x + 2 z = x - 2 p x², where x depends on p as on t, and on M[1, 1] as on 1 / p.
        by_x, t = 1 .- 4p .* x[2:end], times[2:end]
        x = x[2:end]
        @test du0 ≈ [sum(by_x .* x .^ 2) / x0^2, 0] rtol = 1.0e-6 atol = 1.0e-9
        @test dp[1] ≈ sum(by_x .* -t .* x .^ 2 .- 2 .* x .^ 2) rtol = 1.0e-6
        @test dp[2] ≈ sum(by_x .* p .* t .* x .^ 2) rtol = 1.0e-6
    end
    @testset "a field that is Julia code" begin
        text = "function f(du, u, p, t)\n du[1] = u[2]\n du[2] = -u[1] - p[1] * u[2]\n end"
        field = Source{Float64}(2, source_function(text), [0.1])
        for alg in ("Tsit5()", "Rodas5P()"), full in (false, true)
            r = run(field, alg, [0.0, 3.0]; rtol = 1.0e-8, dense = true, full)
            @test r.out[:, 2] ≈ exact(3.0) rtol = 1.0e-6
            du0, _ = adjoint(r.s, "gauss", alg, [0.0, 3.0], [0.0 1.0; 0.0 0.0]; rtol = 1.0e-8)
            @test du0 ≈ exp(matrix() * 3)[1, :] rtol = 1.0e-5
        end
    end
end
