# The package alone: fields written in Julia and handed over as C function pointers, as Python's are.

using LinearAlgebra
using PyJLODE
using PyJLODE: Borrowed, Field, Solve, algorithm, interpolate!, traits
using SciMLSensitivity
using Test

# The harmonic oscillator with a friction that is a parameter: u'' = -u - p u'.
const FRICTION = Ref(0.1)

function oscillator(du::Ptr{T}, u::Ptr{T}, t::Cdouble) where {T}
    x, v = unsafe_load(u, 1), unsafe_load(u, 2)
    unsafe_store!(du, v, 1)
    unsafe_store!(du, -x - T(FRICTION[]) * v, 2)
    return Cint(0)
end

function jacobian(J::Ptr{T}, u::Ptr{T}, t::Cdouble) where {T}
    for (i, value) in enumerate((0, -1, 1, -FRICTION[]))  # column by column
        unsafe_store!(J, T(value), i)
    end
    return Cint(0)
end

no_time(dT::Ptr{T}, u::Ptr{T}, t::Cdouble) where {T} = (unsafe_store!(dT, zero(T), 1); unsafe_store!(dT, zero(T), 2); Cint(0))

function product(out::Ptr{T}, v::Ptr{T}, u::Ptr{T}, t::Cdouble) where {T}
    a, b = unsafe_load(v, 1), unsafe_load(v, 2)
    unsafe_store!(out, -b, 1)
    unsafe_store!(out, a - T(FRICTION[]) * b, 2)
    return Cint(0)
end

function parameter_product(out::Ptr{T}, v::Ptr{T}, u::Ptr{T}, t::Cdouble) where {T}
    unsafe_store!(out, -unsafe_load(v, 2) * unsafe_load(u, 2))
    return Cint(0)
end

function height(margin::Ptr{Cdouble}, u::Ptr{T}, t::Cdouble) where {T}
    unsafe_store!(margin, Cdouble(unsafe_load(u, 1)))
    return Cint(0)
end

failing(du::Ptr{T}, u::Ptr{T}, t::Cdouble) where {T} = Cint(t > 0.5)

"C function pointers of the above; each must be written out, since @cfunction wants its types literally."
pointers(::Type{Float64}) = (
    f = @cfunction(oscillator, Cint, (Ptr{Float64}, Ptr{Float64}, Cdouble)),
    jac = @cfunction(jacobian, Cint, (Ptr{Float64}, Ptr{Float64}, Cdouble)),
    tgrad = @cfunction(no_time, Cint, (Ptr{Float64}, Ptr{Float64}, Cdouble)),
    vjp = @cfunction(product, Cint, (Ptr{Float64}, Ptr{Float64}, Ptr{Float64}, Cdouble)),
    vjp_p = @cfunction(parameter_product, Cint, (Ptr{Float64}, Ptr{Float64}, Ptr{Float64}, Cdouble)),
    event = @cfunction(height, Cint, (Ptr{Cdouble}, Ptr{Float64}, Cdouble)),
)
pointers(::Type{Float32}) = (
    f = @cfunction(oscillator, Cint, (Ptr{Float32}, Ptr{Float32}, Cdouble)),
    jac = @cfunction(jacobian, Cint, (Ptr{Float32}, Ptr{Float32}, Cdouble)),
    tgrad = @cfunction(no_time, Cint, (Ptr{Float32}, Ptr{Float32}, Cdouble)),
    vjp = @cfunction(product, Cint, (Ptr{Float32}, Ptr{Float32}, Ptr{Float32}, Cdouble)),
    vjp_p = @cfunction(parameter_product, Cint, (Ptr{Float32}, Ptr{Float32}, Ptr{Float32}, Cdouble)),
    event = @cfunction(height, Cint, (Ptr{Cdouble}, Ptr{Float32}, Cdouble)),
)

borrow(a::Array{T}) where {T} = Borrowed(UInt(pointer(a)), length(a), a, T)
matrix() = [0 1; -1 -FRICTION[]]
exact(t, u0 = [1.0, 0.5]) = exp(matrix() * t) * u0

function run(::Type{T}, text, times; names = (:f,), rtol = 1.0e-6, kwargs...) where {T}
    all = pointers(T)
    field = Field{T}(2; NamedTuple{names}(all)...)
    u0, out = T[1, 0.5], zeros(T, 2, length(times))
    s, outcome = PyJLODE.solve(
        field, algorithm(text), borrow(u0), borrow(collect(Float64, times)), borrow(out), borrow([0, 2]);
        rtol, atol = rtol, stops = borrow(Float64[]), jumps = borrow(Float64[]), kwargs...
    )
    return (; s, outcome, out, u0)
end

@testset "PyJLODE" begin
    @testset "borrowed memory is the memory itself" begin
        a = [1.0, 2.0, 3.0]
        b = borrow(a)
        @test pointer(b.array) == pointer(a)
        b.array[2] = 5
        @test a[2] == 5
        @test b.owner === a
        @test isempty(Borrowed(0, 0, nothing, Float64).array)
    end

    @testset "$text, $T, to $last" for text in ("DP5()", "Tsit5()", "BS3()", "DP8()", "Vern7()", "Vern9()"),
            T in (Float32, Float64), last in (3.0, -3.0)
        times = range(0, last, length = 7)
        r = run(T, text, times)
        @test r.outcome[1] == "Success"
        @test eltype(r.out) == T
        @test maximum(abs, r.out .- reduce(hcat, exact.(times))) < 2.0e-4
        @test r.out[:, 1] == r.u0
    end

    @testset "$text with its Jacobian" for text in ("Rodas5P()", "Rosenbrock23()", "KenCarp4()", "Kvaerno5()", "TRBDF2()", "RadauIIA5()", "FBDF()")
        times = range(0, 3, length = 7)
        rtol = text in ("Rosenbrock23()", "TRBDF2()") ? 1.0e-4 : 1.0e-6
        r = run(Float64, text, times; names = (:f, :jac, :tgrad), rtol)
        @test r.outcome[1] == "Success"
        @test maximum(abs, r.out .- reduce(hcat, exact.(times))) < 1.0e3 * rtol
        @test r.outcome[6] > 0
        @test traits(algorithm(text)) == (true, true)
    end

    @testset "fixed steps, and from time to time" begin
        times = [0.0, 1.0]
        errors = map((0.1, 0.05)) do step
            r = run(Float64, "RK4()", times; adaptive = false, first_step = step)
            maximum(abs, r.out[:, 2] .- exact(1.0))
        end
        @test 3.7 < log2(errors[1] / errors[2]) < 4.3
        fine = run(Float64, "RK4()", range(0, 1, length = 21); adaptive = false)
        coarse = run(Float64, "RK4()", times; adaptive = false, first_step = 0.05)
        @test fine.out[:, end] ≈ coarse.out[:, end] rtol = 1.0e-12
    end

    @testset "event" begin
        r = run(Float64, "Tsit5()", [0.0, 1.0]; names = (:f, :event), rtol = 1.0e-9)
        time = r.outcome[end]
        @test r.outcome[1] == "Terminated"
        @test abs(exact(time)[1]) < 1.0e-7
        @test r.out[:, 2] ≈ exact(time) rtol = 1.0e-7
    end

    @testset "dense output" begin
        r = run(Float64, "Tsit5()", [0.0, 3.0]; dense = true, rtol = 1.0e-8)
        times, out = [0.3, 1.7, 2.9], zeros(2, 3)
        interpolate!(r.s, borrow(times), borrow(out))
        @test maximum(abs, out .- reduce(hcat, exact.(times))) < 1.0e-6
    end

    @testset "a callback that gives up" begin
        f = @cfunction(failing, Cint, (Ptr{Float64}, Ptr{Float64}, Cdouble))
        field = Field{Float64}(2; f)
        @test_throws PyJLODE.Abandoned PyJLODE.solve(
            field, algorithm("Tsit5()"), borrow([1.0, 1.0]), borrow([0.0, 1.0]), borrow(zeros(2, 2)), borrow([0, 2]);
            rtol = 1.0e-6, atol = 1.0e-6, stops = borrow(Float64[]), jumps = borrow(Float64[])
        )
        @test run(Float64, "Tsit5()", [0.0, 1.0]).outcome[1] == "Success"
    end

    @testset "arrays that a callback saw stay where they are" begin
        field = run(Float64, "Tsit5()", [0.0, 3.0]).s.field
        @test 0 < length(field.pinned) <= PyJLODE.PINNED
        GC.gc()
        @test allunique(pointer.(field.pinned))
    end

    # L = sum of the squares of the states at the outputs; its gradient by differences in exact arithmetic of the flow.
    loss(times, u0) = sum(t -> sum(abs2, exact(t, u0)), times)
    @testset "adjoint $name, $T" for name in ("interpolating", "gauss", "gauss_kronrod", "quadrature", "backsolve"), T in (Float32, Float64)
        times = [0.0, 1.0, 2.0, 2.5]
        rtol = T == Float64 ? 1.0e-9 : 1.0e-5
        r = run(T, "Tsit5()", times; names = (:f, :vjp, :vjp_p), parameters = 1, dense = true, rtol)
        du0, dp = zeros(T, 2), zeros(T, 1)
        PyJLODE.adjoint!(
            borrow(du0), borrow(dp), r.s, name, algorithm("Tsit5()"), borrow(times), borrow(2 .* r.out);
            rtol, atol = rtol
        )
        h = 1.0e-5
        want = [
            (loss(times[2:end], [1.0, 0.5] .+ h .* e) - loss(times[2:end], [1.0, 0.5] .- h .* e)) / 2h for e in ([1, 0], [0, 1])
        ]
        at(p) = (FRICTION[] = p; value = loss(times[2:end], [1.0, 0.5]); FRICTION[] = 0.1; value)
        want_p = (at(0.1 + h) - at(0.1 - h)) / 2h
        @test du0 ≈ want rtol = 1.0e3 * rtol
        @test dp[1] ≈ want_p rtol = 1.0e3 * rtol
    end
end
